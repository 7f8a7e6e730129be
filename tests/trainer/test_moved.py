"""Runs and adapters that are looked at from another folder, or whose files have changed since."""

import json
import shlex
import shutil
from types import SimpleNamespace

import pytest

from dpo_kit.config.compose import check, compose
from dpo_kit.config.data_files import find_files
from dpo_kit.config.recall import recall_config
from dpo_kit.errors import DataError, ModelError
from dpo_kit.evaluate.evaluation import next_command
from dpo_kit.evaluate.job import of_path, plan, share_template
from dpo_kit.run.files import write_json
from dpo_kit.toy import EVAL, MODEL
from dpo_kit.trainer.held_out import refuse_other_rows
from tests.small import write_pairs


@pytest.fixture
def bare(tmp_path):
    """The embedded model without a chat template, and an adapter on it that has one, as training leaves it."""
    base = shutil.copytree(MODEL, tmp_path / "base")
    adapter = tmp_path / "run" / "model"
    adapter.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter)
    shutil.move(base / "chat_template.jinja", adapter)
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": str(base)})
    return tmp_path


def test_a_relative_path_starts_from_the_folder_of_the_run_also_elsewhere(tmp_path, monkeypatch):
    proj = tmp_path / "proj"
    proj.mkdir()
    write_pairs(proj / "p.jsonl")
    (proj / "base").symlink_to(MODEL)
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"path": "base", "reference": None},
        "data": {"train": [{"path": "p.jsonl"}], "eval": "org/rows"},
    }
    manifest = {"config": config, "folder": str(proj), "model": {"sha256": "0"}}
    found = recall_config(manifest)
    assert found["model"]["path"] == str(proj / "base") and found["data"]["train"] == [{"path": str(proj / "p.jsonl")}]
    assert found["data"]["eval"] == "org/rows"  # of the hub
    assert config["model"]["path"] == "base"  # what the run is known by stays
    shutil.move(proj, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert recall_config(manifest)["model"]["path"] == "base"  # moved as a whole, looked at from inside
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=rf"model\.path=base is not there any more \(the run was started in {proj}\)"):
        recall_config(manifest)


def test_a_pattern_of_files_and_a_template_s_file_are_found_from_elsewhere_too(tmp_path, monkeypatch):
    proj = tmp_path / "proj"
    (proj / "data").mkdir(parents=True)
    write_pairs(proj / "data" / "a.jsonl")
    (proj / "chat.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(tmp_path)
    config = {"model": {"path": "org/model", "chat_template": "chat.jinja"}, "data": {"train": "data/*.jsonl"}}
    found = recall_config({"config": config, "folder": str(proj)})
    assert found["data"]["train"] == str(proj / "data" / "*.jsonl") and find_files(found["data"]["train"], "train")
    assert found["model"] == {"path": "org/model", "chat_template": str(proj / "chat.jinja")}
    config["model"]["chat_template"] = "{% for m in messages %}" + "x" * 300 + "{% endfor %}"
    assert recall_config({"config": config, "folder": str(proj)})["model"] == config["model"]


def test_an_adapter_whose_base_is_named_from_its_run_s_folder_is_found_from_any(bare, monkeypatch):
    write_json(bare / "run" / "model" / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "base"})
    write_json(bare / "run" / "manifest.json", {"folder": str(bare)})
    monkeypatch.chdir("/")
    assert of_path("policy", str(bare / "run" / "model"), check(compose()).model).model.path == str(bare / "base")


def test_rows_are_read_with_the_adapter_s_own_template_and_all_of_a_held_out_file_is_measured(bare):
    rows = [json.loads(line) for line in EVAL.read_text().splitlines()[:12]]
    texts = [{key: row[key][0]["content"] for key in ("prompt", "chosen", "rejected")} for row in rows]
    (bare / "e.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    words = [
        f"policy={bare / 'run' / 'model'}",
        f"reference={bare / 'base'}",
        "data=jsonl",
        f"data.eval={bare}/e.jsonl",
    ]
    for more in ([], [f"data.train={bare}/e.jsonl"]):
        job = share_template(*plan([*words, *more]))
        kind, held_out = job.held_out()
        assert (kind, job.split, len(held_out)) == ("pairs", "all", len(texts))
        assert {row["prompt"][0]["content"] for row in held_out} == {text["prompt"] for text in texts}  # as chats
        assert job.reference.tokenizer().chat_template == job.policy.tokenizer().chat_template is not None
    job = share_template(*plan([*words, "split=select"]))
    assert 0 < len(job.held_out()[1]) < len(texts)


def test_rows_that_are_not_the_run_s_are_refused():
    rows = [{"pair_id": "a", "prompt": "x", "chosen": "y", "rejected": "z"}]
    manifest = {"config": {"data": {"train": "p.jsonl"}}, "data": {"test": {"rows": 5, "sha256": "0"}}}
    with pytest.raises(DataError, match=r"data\.train=p\.jsonl gives other test rows .* \(1, then 5\)"):
        refuse_other_rows(manifest, "test", rows)


def test_what_to_type_next_keeps_what_was_typed(tmp_path):
    """The judge, data, gold and out of an evaluation; asked of the function alone, as of a done one."""
    words = ("policy=my model", "reference=base", "data=jsonl", "data.eval=e f", "judge=llm", "out=o", "parts=[gate]")
    options = SimpleNamespace(parts=["preferences"], review=0)
    job = SimpleNamespace(words=words, options=options, run=None, step=None, folder=tmp_path, shared=tmp_path)
    said = next_command(job, {})
    assert shlex.split(said) == ["python", "-m", "dpo_kit", "evaluate", *words[:-1], "parts=[win_rate]"]
    options.parts = ["win_rate"]
    won = {"status": "done", "judge": {"kind": "llm"}, "win_rate_verdict": "better", "review": None, "comparisons": 256}
    said = next_command(job, {"win_rate": won})
    assert said.startswith(f"read {tmp_path / 'samples.md'}")
    assert said.endswith("judge=llm out=o 'parts=[gate]' review=100")
    options.review, won["review"] = 20, {"checked": 0}
    assert next_command(job, {"win_rate": won}).startswith(f"fill in the column better of {tmp_path / 'review*.csv'}")
    won["review"] = {"checked": 20}
    assert next_command(job, {"win_rate": won}) == f"read {tmp_path / 'samples.md'}"  # does not ask for it again
