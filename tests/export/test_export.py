"""An export is the policy that the run left, as a plain transformers folder; complete or absent."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_kit import ConfigError, ModelError, compose, train
from dpo_kit.export.__main__ import main, parse_words
from dpo_kit.export.folder import encode, export_run, find_faults, push
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json, write_json
from dpo_kit.run.report.card import card_text
from dpo_kit.toy import MODEL
from tests.run.test_card import CANARY, MANIFEST, RESULT
from tests.small import few_pairs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each tuning, large enough a step to be told from its start."""
    root = tmp_path_factory.mktemp("runs")
    few = [*few_pairs(root / "pairs.jsonl"), "callbacks=none", "trl.save_strategy=no"]
    for tuning in ("full", "lora", "qlora"):
        train(compose([*few, f"model.tuning={tuning}", "trl.learning_rate=1e-2"]), root / tuning)
    return root


@pytest.fixture
def lora(runs, tmp_path):
    """A copy of the LoRA run, to be spoilt."""
    return RunDirectory(shutil.copytree(runs / "lora", tmp_path / "run"))


def _policy(run, tuning):
    if tuning == "full":
        return AutoModelForCausalLM.from_pretrained(run / "model").eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), run / "model").eval()


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
@torch.no_grad()
def test_an_export_answers_as_the_policy_in_plain_transformers(tuning, runs, tmp_path):
    out = tmp_path / "export"
    facts = export_run(RunDirectory(runs / tuning), out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([encode(tokenizer, "My kettle leaks. What can I do?")])
    expected, start = _policy(runs / tuning, tuning), AutoModelForCausalLM.from_pretrained(MODEL).eval()
    logits = expected(input_ids=ids).logits
    assert torch.allclose(model(input_ids=ids).logits, logits, atol=1e-4)
    assert not torch.allclose(start(input_ids=ids).logits, logits, atol=1e-2)
    greedy = [m.generate(input_ids=ids, do_sample=False, max_new_tokens=24).tolist() for m in (model, expected)]
    assert greedy[0] == greedy[1] and facts["dtype"] == "float32"
    names = {path.name for path in out.iterdir()}
    assert names >= {"model.safetensors", "chat_template.jinja", "generation_config.json", "README.md", "export.json"}
    assert not {"adapter_config.json", "training_args.bin"} & names and not list(tmp_path.glob(".saving*"))


def test_an_export_in_bfloat16_says_how_far_rounding_moved_it(runs, tmp_path):
    out = tmp_path / "export"
    facts = export_run(RunDirectory(runs / "lora"), out, dtype="bfloat16")
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(out / "model.safetensors").values())
    assert read_json(out / "config.json")["dtype"] == "bfloat16"
    assert 1e-5 < facts["logits"] < 5e-2 and facts["kl"] > 0
    assert "Weights in bfloat16" in (out / "README.md").read_text()


def test_a_qlora_adapter_on_its_dequantised_base_is_the_policy_that_was_measured(runs, tmp_path, caplog):
    run = RunDirectory(runs / "qlora")
    caplog.set_level("WARNING", "dpo_kit")
    texts = [export_run(run, tmp_path / base, base=base)["checked"] for base in ("original", "dequantised")]
    apart = [float(text.split("4 bit, KL ")[1].split()[0]) for text in texts]
    assert apart[0] > 0.02 > 100 * apart[1]  # the tiny model feels the rounding of its base
    assert caplog.text.count("take base=dequantised") == 1
    weights = [load_file(tmp_path / base / "model.safetensors") for base in ("original", "dequantised")]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[0][name], weights[1][name])


def test_the_same_command_again_leaves_the_export_and_another_one_is_refused(runs, tmp_path):
    run, out = RunDirectory(runs / "full"), tmp_path / "export"
    first = export_run(run, out)
    written = (out / "export.json").stat().st_mtime_ns
    assert export_run(run, out) == first and (out / "export.json").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="holds something else"):
        export_run(run, out, dtype="bfloat16")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("…")
    with pytest.raises(ConfigError, match="holds something else"):
        export_run(run, mine)
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]


def test_what_merging_would_change_is_refused_and_nothing_is_left(lora, tmp_path, monkeypatch):
    def wrong(self, safe_merge):
        return self.unload()

    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_and_unload", wrong)
    with pytest.raises(ModelError, match=r"merging the adapter changed the policy.*nothing is exported"):
        export_run(lora, tmp_path / "export")
    assert not (tmp_path / "export").exists() and not list(tmp_path.glob(".saving*"))


def test_what_writing_would_change_is_refused(lora, tmp_path, monkeypatch):
    def spoil(self, folder, **options):
        kept(self, folder, **options)
        weights = load_file(folder / "model.safetensors")
        save_file({k: 1.2 * v for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})

    kept = AutoModelForCausalLM.from_pretrained(MODEL).__class__.save_pretrained
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", spoil)
    with pytest.raises(ModelError, match="writing the export changed the policy"):
        export_run(lora, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_an_adapter_on_another_base_is_refused(lora, tmp_path):
    other = shutil.copytree(MODEL, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 0.1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    manifest = read_json(lora.manifest)
    manifest["config"]["model"]["path"] = str(other)
    write_json(lora.manifest, manifest)
    with pytest.raises(ModelError, match="does not hold the weights that the adapter was trained on"):
        export_run(lora, tmp_path / "export")


def test_an_adapter_on_one_of_two_tied_embeddings_unties_them(lora, tmp_path):
    torch.manual_seed(1)
    options = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), options).eval()
    adapted.save_pretrained(lora.model, save_embedding_layers=False)
    export_run(lora, tmp_path / "export")
    assert read_json(tmp_path / "export" / "config.json")["tie_word_embeddings"] is False
    with torch.no_grad():
        ids = torch.arange(5, 25)[None]
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
        assert torch.allclose(plain(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-4)


def test_answers_end_at_the_tokenizer_s_end_whatever_the_base_s_generation_config_says(lora, tmp_path):
    base = shutil.copytree(MODEL, tmp_path / "base")
    generation = read_json(base / "generation_config.json") | {"eos_token_id": 3}
    write_json(base / "generation_config.json", generation)
    manifest = read_json(lora.manifest)
    manifest["config"]["model"]["path"] = str(base)
    write_json(lora.manifest, manifest)
    export_run(lora, tmp_path / "export")
    assert read_json(tmp_path / "export" / "generation_config.json")["eos_token_id"] == [3, 4]


@pytest.mark.parametrize(
    ("file", "change", "fault"),
    [
        ("config.json", {"architectures": None}, "names no architectures"),
        ("config.json", {"dtype": "float64"}, "has dtype float64"),
        ("config.json", {"quantization_config": {"load_in_4bit": True}}, "asks for quantisation"),
        ("config.json", {"auto_map": {"AutoModel": "code.Model"}}, "asks for code"),
        ("generation_config.json", {"eos_token_id": 2}, "does not end at the tokenizer's EOS .id 4."),
        ("generation_config.json", {"eos_token_id": [4, 900]}, "eos_token_id 900 lies outside the vocabulary"),
    ],
)
def test_what_a_server_would_trip_over_is_named(file, change, fault, tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "model")
    assert find_faults(folder) == []
    write_json(folder / file, read_json(folder / file) | change)
    (found,) = find_faults(folder)
    assert re.search(fault, found)


def test_missing_files_are_named(tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert find_faults(folder) == ["there are no weights in safetensors"]
    (folder / "generation_config.json").unlink()
    assert find_faults(folder) == ["generation_config.json is missing"]


def test_only_a_run_that_ended_well_is_exported(lora, tmp_path):
    with pytest.raises(ConfigError, match=r"is no run directory .*: did you mean run=.*run\?"):
        export_run(RunDirectory(lora.model), tmp_path / "export")
    write_json(lora.result, {"status": "interrupted"})
    with pytest.raises(ConfigError, match=r"has not ended well \(status: interrupted\)"):
        export_run(lora, tmp_path / "export")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["outputs/run"], "did you mean run=outputs/run"),
        (["run=x", "dtyp=float32"], "did you mean dtype"),
        (["run=x", "dtype=fp8"], "dtype must be one of auto, float32, bfloat16, float16, got fp8"),
        (["run=x", "mode=script", "push=a/b"], "push belongs to mode=model"),
        (["run=x", "push=mine"], "push must be org/name, got mine"),
    ],
)
def test_wrong_words_are_refused_with_what_was_meant(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_an_export_is_pushed_as_private_unless_said_otherwise(tmp_path, monkeypatch):
    asked = []

    class Hub:
        def create_repo(self, repository, **options):
            asked.append((repository, options))
            return type("Url", (str,), {"repo_id": repository})(f"https://hub/{repository}")

        def upload_folder(self, **options):
            asked.append(options)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert parse_words(["run=x"])["private"] == "true"
    assert push(tmp_path, "org/name", private=True) == "https://hub/org/name"
    assert asked[0] == ("org/name", {"private": True, "exist_ok": True})
    assert (asked[1]["repo_id"], asked[1]["folder_path"]) == ("org/name", tmp_path)


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"push=org/name: the hub refuses it .*the folder is"):
        push(tmp_path, "org/name", private=True)


def test_the_card_of_an_export_names_win_rate_and_check_and_no_secret():
    judged = {"win_rate": 0.625, "win_rate_low": 0.55, "win_rate_high": 0.7, "note": CANARY}
    facts = {"how": "Merged.", "dtype": "bfloat16", "checked": f"logits within 1e-3 {CANARY}"}
    text = card_text(RESULT, MANIFEST, judged, facts)
    assert "Win rate against the reference, ties counting half: 0.625 [0.550, 0.700]." in text
    assert "Merged. Weights in bfloat16." in text and "library_name: transformers" in text
    assert CANARY not in text and "swordfish" not in text


@pytest.mark.slow
def test_the_command_exports_a_run_and_says_what_to_type_next(runs, command, tmp_path):
    done = command("export", f"run={runs / 'lora'}", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "next: transformers chat" in done.stdout and not done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True
