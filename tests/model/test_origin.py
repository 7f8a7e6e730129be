"""What a model's or data set's repository may not do: run code, pass as something else, or as another vocabulary."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tokenizers import pre_tokenizers
from transformers import LlamaForCausalLM

from dpo_kit.config.compose import check, compose
from dpo_kit.data.read import read_source
from dpo_kit.errors import ConfigError, ModelError
from dpo_kit.model.load import load_named, load_policy, load_reference, load_tokenizer
from dpo_kit.model.origin import find_parent
from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def settings(*overrides):
    return check(compose(["model=local", "allow_learning_rate=true", *overrides])).model


def load(*overrides):
    model = settings(*overrides)
    tokenizer = load_tokenizer(model)
    return load_policy(model, tokenizer), load_reference(model)


@pytest.fixture
def folder(tmp_path):
    return Path(tiny.saved_model(tmp_path / "start"))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class Canary:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_loaded_weights_keep_no_keys_and_values_while_they_are_trained_or_scored(folder):
    assert [model.config.use_cache for model in load(f"model.path={folder}")] == [False, False]


# --- code ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("weights in a pickle that runs code", promise="P11")
def test_pickled_weights_are_refused_unread_with_the_remedy(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Canary(tmp_path / "ran")}, folder / "pytorch_model.bin")
    for key in ("model.path", "model.reference"):
        other = [] if key == "model.path" else [f"model.path={tiny.saved_model(tmp_path / 'good')}"]
        with pytest.raises(ModelError, match=rf"{key}=.*pytorch_model.bin, a pickle.*use_safetensors=False"):
            load(*other, f"{key}={folder}")
    assert not (tmp_path / "ran").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the canary does sing
    assert (tmp_path / "ran").exists()


@pytest.mark.fault("code in a model's folder", promise="P11")
@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_code_in_a_model_s_folder_is_not_run(folder, tmp_path, what):
    (folder / "modeling_mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Mine: pass\n")
    if what == "model":
        mapped = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_mine.Mine")
        edit(folder / "config.json", auto_map=mapped, model_type="mine")
    else:
        mapped = {"AutoTokenizer": [None, "modeling_mine.Mine"]}
        edit(folder / "tokenizer_config.json", auto_map=mapped, tokenizer_class="Mine")
    try:
        load(f"model.path={folder}")
    except ModelError as error:
        assert "custom code" in str(error) and "model.revision=<40 hex digits>" in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault("remote code without a commit", promise="P11")
@pytest.mark.parametrize("revision", ["null", "main", "v1.0", COMMIT[:12]])
def test_remote_code_needs_a_full_commit(revision):
    with pytest.raises(ConfigError, match="full commit hash"):
        settings("model.path=org/name", f"model.revision={revision}", "model.trust_remote_code=true")
    assert settings("model.path=org/name", f"model.revision={COMMIT}", "model.trust_remote_code=true")


@pytest.mark.fault("remote code from a folder", promise="P11")
def test_remote_code_needs_a_repository(folder):
    with pytest.raises(ConfigError, match="is a folder"):
        settings(f"model.path={folder}", f"model.revision={COMMIT}", "model.trust_remote_code=true")


@pytest.mark.fault("code of the reference under the policy's commit", promise="P11")
def test_trust_reaches_the_named_repository_only_and_pins_its_code(folder):
    given = {}

    class Recorder:
        @staticmethod
        def from_pretrained(path, **options):
            given[path] = options

    model = settings("model.path=org/name", f"model.revision={COMMIT}", "model.trust_remote_code=true")
    model.reference = str(folder)
    for path in (model.path, model.reference):
        load_named(Recorder, path, model)
    pinned = {"trust_remote_code": True, "revision": COMMIT, "code_revision": COMMIT}
    assert given == {"org/name": pinned, str(folder): {"trust_remote_code": False}}


@pytest.mark.fault("code in a third repository", promise="P11")
def test_code_of_another_repository_is_refused(folder):
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "someone/else--modeling.Model"})
    with pytest.raises(ModelError, match="lies in another repository, someone/else"):
        load(f"model.path={folder}")


@pytest.mark.fault("attention code from the hub", promise="P11")
def test_attention_code_from_a_repository_is_refused(folder):
    with pytest.raises(ConfigError, match="would download code"):
        settings(f"model.path={folder}", "model.attn_implementation=org/kernel")
    edit(folder / "config.json", attn_implementation="org/kernel")
    with pytest.raises(ModelError, match="attention code from org/kernel"):
        load(f"model.path={folder}")


@pytest.mark.fault("a script in a data set's folder", promise="P11")
def test_a_data_set_s_scripts_are_not_run(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for name in ("set.py", "__init__.py", "dataset.py"):
        (tmp_path / "set" / name).write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    assert len(list(read_source(str(tmp_path / "set"), "train"))) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault("pickled weights that the first look misses, as on the hub", promise="P11")
def test_pickled_weights_are_refused_by_transformers_as_well(folder, tmp_path, monkeypatch):
    (folder / "model.safetensors").unlink()
    torch.save(tiny.model().state_dict(), folder / "pytorch_model.bin")
    monkeypatch.setattr("dpo_kit.model.origin._refuse_pickles", lambda *_: None)
    with pytest.raises(ModelError, match="Only safetensors are loaded, no pickles"):
        load(f"model.path={folder}")


# --- secrets ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("a secret in the model's config.json", promise="P10")
def test_a_secret_in_the_model_s_config_is_refused_since_it_would_be_saved_along(folder):
    edit(folder / "config.json", notes={"uploaded_with": "hf_" + "aB3" * 11})
    with pytest.raises(ModelError, match=r"uploaded_with in its config.json looks like a secret") as refusal:
        load(f"model.path={folder}")
    assert "aB3aB3" not in str(refusal.value)


# --- adapters and runs ---------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(folder, tmp_path):
    tuned = get_peft_model(LlamaForCausalLM.from_pretrained(folder), tiny.LORA)
    tuned.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.fault("an adapter in a model's place", promise="P7")
@pytest.mark.parametrize("roles", [("path",), ("reference",), ("path", "reference")])
def test_an_adapter_is_refused_with_its_base_and_how_to_merge_it(folder, adapter, roles):
    paths = [f"model.{role}={adapter if role in roles else folder}" for role in ("path", "reference")]
    with pytest.raises(ModelError, match=rf"model.{roles[0]}=.* is an adapter on {folder}.*merge_and_unload"):
        load(*paths)


def run_at(folder, status="done"):
    """What a run leaves, as far as its descendants read it."""
    tiny.saved_model(folder / "model")
    tiny.saved_model(folder / "checkpoints" / "checkpoint-2")
    (folder / "manifest.json").write_text(json.dumps({"config_hash": "abc", "config": {}}))
    if status:
        result = {"status": status, "method": "ipo", "beta": 0.2, "seed": 3, "model": "org/base"}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_finished_run_s_model_is_a_start_and_its_parent_known(tmp_path):
    run = run_at(tmp_path / "run")
    found = find_parent("model.path", str(run / "model"))
    parent = {"method": "ipo", "beta": 0.2, "seed": 3, "model": "org/base", "run": str(run), "config_hash": "abc"}
    assert found == parent
    load(f"model.path={run / 'model'}")


@pytest.mark.fault("a start inside an unfinished run", promise="P7")
@pytest.mark.parametrize("key", ["model.path", "model.reference"])
@pytest.mark.parametrize("status", [None, "failed", "interrupted"])
def test_an_unfinished_run_s_model_is_no_start(tmp_path, folder, key, status):
    run = run_at(tmp_path / "run", status)
    with pytest.raises(ModelError, match=f"{key}=.*status: {status or 'running or killed'}"):
        load(f"model.path={folder}", f"{key}={run / 'model'}")


@pytest.mark.fault("a checkpoint of a run as start", promise="P7")
def test_a_checkpoint_or_a_run_directory_as_start_is_refused_with_what_was_meant(tmp_path):
    run = run_at(tmp_path / "run")
    with pytest.raises(ModelError, match=f"middle of the run.*model.path={run / 'model'}.*copy"):
        load(f"model.path={run / 'checkpoints' / 'checkpoint-2'}")
    with pytest.raises(ModelError, match=f"did you mean its policy, model.path={run / 'model'}"):
        load(f"model.path={run}")


# --- vocabulary ---------------------------------------------------------------------------------------------------


@pytest.mark.fault("a reference of another vocabulary", promise="P7")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("order", "token 'assistant': 13 and 2"),
        ("added", "rows of the embedding: 14 and 15"),
        ("resized", "rows of the embedding: 14 and 16"),
        ("eos", "eos_token_id: 1 and 0"),
        ("split", "is encoded differently"),
    ],
)
def test_a_reference_that_reads_ids_otherwise_is_refused(folder, tmp_path, change, message):
    words = [*tiny.WORDS, "user", "assistant"]
    made = tiny.tokenizer([*reversed(words)] if change == "order" else [*words, "new"] if change == "added" else words)
    if change == "eos":
        made.eos_token = "<pad>"
    if change == "split":
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tiny.model({"added": 15, "resized": 16}.get(change, 14)).save_pretrained(tmp_path / "other")
    made.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=message):
        load(f"model.path={folder}", f"model.reference={tmp_path / 'other'}")


def test_a_reference_of_the_same_vocabulary_is_accepted(folder, tmp_path):
    other = tiny.saved_model(tmp_path / "other", seed=1)
    policy, reference = load(f"model.path={folder}", f"model.reference={other}")
    assert not torch.equal(policy.lm_head.weight, reference.lm_head.weight)


@pytest.mark.fault("a tokenizer with more tokens than the model", promise="P7")
def test_a_tokenizer_that_knows_more_than_its_model_is_refused(folder):
    tiny.tokenizer([*tiny.WORDS, "user", "assistant", "new"]).save_pretrained(folder)
    with pytest.raises(ModelError, match="knows 15 tokens, its model only 14"):
        load(f"model.path={folder}")


# --- paths --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("a name that leaves the run's folder", promise="P11")
@pytest.mark.parametrize("name", ["../../up", "/abs", "a/b", "..", "", "a\nb"])
def test_a_method_s_name_cannot_leave_the_folder_of_runs(tmp_path, name):
    (tmp_path / "method").mkdir()
    text = f"defaults: [dpo, _self_]\nname: {json.dumps(name)}\n"
    (tmp_path / "method" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"method\.name"):
        compose(["method=mine"], config_dir=tmp_path)


@pytest.mark.fault("a job that leaves the sweep's folder", promise="P11")
@pytest.mark.parametrize("where", ["../out-${beta}", "/tmp/out-${beta}", "a/../../b${beta}"])
def test_a_job_s_folder_stays_inside_the_sweep(where):
    from dpo_kit.sweep.launch.plan import plan_sweep

    with pytest.raises(ConfigError, match="must stay inside"):
        plan_sweep(["beta=0.1,0.2", f"hydra.sweep.subdir='{where}'"], [], "config")
