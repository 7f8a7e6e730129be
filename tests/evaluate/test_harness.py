"""lm-evaluation-harness as a gate: local tasks, a tuned run and its reference, what is refused and why."""

import json
from pathlib import Path

import pytest

from dpo_kit import compose, train
from dpo_kit.config.compose import check
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.evaluate.benchmarks.gate import run_harness
from dpo_kit.evaluate.job import Candidate
from dpo_kit.evaluate.options import Harness
from dpo_kit.toy.domain import DESK_OF, DESKS, QUESTIONS, desk_answer
from tests.small import few_pairs

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is in the extra eval")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: {better}}}
metadata: {{version: 1.0}}
"""


def write_desks(folder: Path, count: int, kind: str = "multiple_choice", name: str = "desks", **changes: str) -> Path:
    """A task in lm-eval's format: which desk repairs what, the eight desks to choose from."""
    items = [(item, question) for question in QUESTIONS for item in DESK_OF][:count]
    rows = [
        {"question": question.format(item=item), "label": list(DESKS).index(DESK_OF[item]), "desk": desk_answer(item)}
        for item, question in items
    ]
    folder.mkdir(exist_ok=True)
    (folder / "desks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choices = "doc_to_choice: " + json.dumps([f"The {desk} desk." for desk in DESKS])
    written = {"metric": "acc", "better": "true", "kind": kind, "name": name} | changes
    text = TASK.format(file=folder / "desks.jsonl", **written)
    if kind == "multiple_choice":
        text += choices
    else:
        text = text.replace("{{label}}", "{{desk}}") + 'generation_kwargs: {until: ["\\n"], max_gen_toks: 12}'
    (folder / f"{name}.yaml").write_text(text)
    return folder


def untrained(name: str = "reference") -> Candidate:
    return Candidate(name, check(compose([])).model)


def test_a_tuned_lora_run_is_compared_with_its_reference_in_pairs(tmp_path, monkeypatch):
    """A rate far too high on requests alone damages the other skill, which the gate sees; the reference is kept."""
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "cache"))
    tuned = ["model.tuning=lora", "trl.learning_rate=0.1", "trl.max_steps=40", "callbacks=none"]
    cfg = compose([*few_pairs(tmp_path / "pairs.jsonl"), *tuned])
    run = train(cfg, tmp_path / "run")
    assert run.status == "done"
    policy = Candidate("policy", check(cfg).model, tmp_path / "run" / "model")
    options = Harness(tasks=["desks"], include_path=[str(write_desks(tmp_path / "tasks", 120))])
    result = run_harness(policy, untrained(), options, tmp_path / "out")
    (task,) = result["tasks"]
    assert task["n"] == 120 and task["reference"] > 0.9 and task["policy"] < 0.7
    assert task["difference"] == pytest.approx(task["policy"] - task["reference"])
    assert not result["gate"]["passed"] and result["gate"]["worst_task"] == "desks"
    rows = [json.loads(line) for line in (tmp_path / "out/gate/desks.reference.jsonl").read_text().splitlines()]
    assert sum(row["metrics"]["acc"] for row in rows) == pytest.approx(120 * task["reference"])
    assert "Who repairs the toaster?" in rows[0]["prompt"] and rows[0]["prompt"] != "Who repairs the toaster?"

    monkeypatch.setattr(Candidate, "load", lambda self: pytest.fail("scored again"))
    assert run_harness(policy, untrained(), options, tmp_path / "again") == result
    with pytest.raises(BaseException, match="scored again"):
        run_harness(policy, untrained(), options.model_copy(update={"limit": 7}), tmp_path / "other")


def test_generated_answers_are_scored_and_a_metric_without_numbers_per_sample_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "cache"))
    tasks = write_desks(tmp_path / "tasks", 24, "generate_until", "spoken", metric="exact_match")
    write_desks(tmp_path / "tasks", 24, "generate_until", "errors", metric="exact_match", better="false")
    options = Harness(tasks=["spoken", "errors"], include_path=[str(tasks)], limit=20, max_regression=0.2)
    result = run_harness(untrained("policy"), untrained(), options, tmp_path / "out")
    spoken, errors = result["tasks"]
    assert spoken["n"] == 20 and spoken["policy"] == spoken["reference"] > 0.9 and spoken["verdict"] == "passed"
    assert errors["policy"] == -spoken["policy"]
    row = json.loads((tmp_path / "out/gate/spoken.reference.jsonl").read_text().splitlines()[0])
    assert row["target"] == "The kitchen desk." and "The kitchen desk." in row["response"]

    write_desks(tmp_path / "tasks", 24, "generate_until", "again", metric="exact_match")
    (tasks / "both.yaml").write_text("group: both\ntask: [spoken, again]\n")
    (both,) = run_harness(
        untrained("policy"), untrained(), options.model_copy(update={"tasks": ["both"]}), tmp_path / "both"
    )["tasks"]
    assert (both["task"], both["n"], both["policy"]) == ("both", 40, spoken["policy"])

    other = options.model_copy(update={"metrics": {"spoken": "bleu"}})
    with pytest.raises(DataError, match=r"no number per sample for bleu.*exact_match,none"):
        run_harness(untrained("policy"), untrained(), other, tmp_path / "out")


def refusal(folder: Path, **options) -> str:
    with pytest.raises(ConfigError) as refused:
        run_harness(untrained("policy"), untrained(), Harness(**options), folder)
    return str(refused.value)


def test_what_cannot_be_had_or_must_not_be_run_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(Candidate, "load", lambda self: pytest.fail("loaded"))
    for name in ("humaneval", "mbpp_instruct"):
        assert "executes on this machine what the model writes: allow_code=true" in refusal(tmp_path, tasks=[name])
    tasks = write_desks(tmp_path / "tasks", 8)
    own = (tasks / "desks.yaml").read_text()
    (tasks / "unsafe.yaml").write_text(own.replace("task: desks", "task: runs_code\nunsafe_code: true"))
    local = {"include_path": [str(tasks)]}
    assert "task runs_code executes" in refusal(tmp_path, tasks=["runs_code"], **local)
    assert "did you mean desks" in refusal(tmp_path, tasks=["desk"], **local)
    assert "include_path=nowhere is no folder" in refusal(tmp_path, tasks=["desks"], include_path=["nowhere"])
    assert "metrics names desk," in refusal(tmp_path, tasks=["desks"], metrics={"desk": "acc"}, **local)
    (tasks / "desks.jsonl").unlink()
    assert "data of task desks are not on this machine" in refusal(tmp_path, tasks=["desks"], **local)


def test_without_a_network_a_task_of_the_hub_says_how_to_fetch_its_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    said = refusal(tmp_path, tasks=["gsm8k"])
    assert "data of task gsm8k are not on this machine and cannot be fetched (HF_HUB_OFFLINE is set)" in said
    assert "load_dataset('openai/gsm8k', 'main')" in said and "or choose other tasks=" in said
