"""Benchmarks, failures and the hacking watch as parts of `python -m dpo_kit evaluate`, on the embedded lab."""

import importlib.util
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from dpo_kit import compose, toy
from dpo_kit.config.compose import CONF, check
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.evaluate import win_rate
from dpo_kit.evaluate.__main__ import work
from dpo_kit.evaluate.benchmarks import gate
from dpo_kit.evaluate.benchmarks.gate import compare_task, decide_gate
from dpo_kit.evaluate.job import GROUPS, Candidate, plan
from dpo_kit.evaluate.options import Alpaca, Domain, Harness
from dpo_kit.evaluate.part import models_of
from dpo_kit.evaluate.win_rate import Compared, win_rates
from dpo_kit.judge.answers import Answer
from dpo_kit.judge.verdicts import Verdict
from dpo_kit.run.files import read_json, write_json, write_jsonl
from dpo_kit.toy.domain import DESK_OF, QUESTIONS
from tests.evaluate.test_evaluate import read_jsonl, result_of, run, trained  # noqa: F401
from tests.scripted_server import Turn, scripted_server

DEFAULTS = yaml.safe_load((CONF / "tool" / "evaluate.yaml").read_text())

needs_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is in the extra eval"
)


def write_labelled(file, count=6):
    rows = [{"prompt": QUESTIONS[0].format(item=item), "label": desk} for item, desk in list(DESK_OF.items())[:count]]
    write_jsonl(file, rows)
    return file


# --- settings ----------------------------------------------------------------------------------------------------


def test_the_file_has_every_key_of_every_part_and_the_defaults_of_the_code():
    for name, options in {
        "gate": Harness(),
        "alpaca_eval": Alpaca(),
        "domain": Domain(file="?"),
    }.items():
        told = {"max_regression": "${choose.max_regression}", "file": "???"}
        assert DEFAULTS[name] == {key: told.get(key, value) for key, value in options.model_dump().items()}, name
    for name, options in GROUPS.items():
        assert {*DEFAULTS[name]} == {*options.model_fields}, name


@needs_eval
def test_what_is_wrong_with_a_part_s_settings_is_said_before_anything_is_measured(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Candidate, "load", lambda self: pytest.fail("a model was loaded"))
    (tmp_path / "one.jsonl").write_text('{"prompt": "x"}\n')
    for words, said in (
        (["parts=[gate]", "gate.task=[x]"], r"unknown key gate\.task; did you mean gate\.tasks\?"),
        (["parts=[mt_bench]", "mt_bench.judge.model=x"], r"did you mean judge\.model\?"),
        (["gate.limit=5"], r"gate\.limit=5 does nothing .*, parts=\[preferences,win_rate,failures,hacking,gate\]"),
        (["win_rate.limit=5", "parts=preferences"], r"nothing without the part win_rate: add it, parts=\[pref.*,win_r"),
        (["judge=human", "parts=[preferences,gate]"], "judge=human does nothing without the part win_rate"),
        (["parts=[domain]", "review=4", "domain.file=x"], "review=4 does nothing without the part win_rate"),
        (["parts=[gat]"], r"got gat; did you mean gate\?"),
        (["parts=[gate]", "gate.limit=0"], r"gate\.limit: .*greater than 0"),
        (["parts=[win_rate,gate]", "gate.tasks=[humaneval]"], "allow_code=true"),
        (["parts=[win_rate,gate]", "gate.tasks=[x]", "gate.include_path=[nowhere]"], "=nowhere is no folder"),
        (["parts=[domain]"], r"domain\.file is missing"),
        (["parts=[win_rate,domain]", f"domain.file={tmp_path / 'one.jsonl'}"], "one.jsonl:1 must have prompt"),
        (["parts=[domain]", "domain.file=x", "domain.pattern='('"], "is no regular expression"),
        (["parts=[mt_bench]", "mt_bench.questions=x"], r"a language model that grades: add judge=llm"),
        (["parts=[win_rate,alpaca_eval]", "alpaca_eval.instructions=none.json"], r"none\.json: no such file"),
    ):  # fmt: skip
        with pytest.raises((ConfigError, DataError), match=said):
            work([f"run={run}", *words])
    assert not (run / "evaluation").exists()


def test_the_loss_that_the_gate_allows_is_that_of_the_run_s_choice(run):  # noqa: F811
    def limit(*words):
        (job,) = plan([f"run={run}", "parts=[gate]", *words])
        return job.options.gate.max_regression

    assert limit() == 0.03
    write_json(
        run / "manifest.json",
        read_json(run / "manifest.json") | {"choose": {"kl_budget_nats": 4, "max_regression": 0.1}},
    )
    assert limit() == 0.1 and limit("gate.max_regression=0.2") == 0.2


# --- parts -------------------------------------------------------------------------------------------------------


def test_losses_are_sorted_and_hacking_is_watched_without_being_asked_for(run, capsys):  # noqa: F811
    write_jsonl(run / "metrics.jsonl", [
        {"step": step, "gold/reward": gold, "gold/reward_low": gold - 0.1, "gold/reward_high": gold + 0.1,
         "probe/reward_margin": step / 10} for step, gold in ((0, 1.0), (10, 2.0), (20, 0.5))
    ])  # fmt: skip
    work([f"run={run}", "win_rate.draws=4", "win_rate.opponent_seed=1"])
    shown, folder = capsys.readouterr().out, run / "evaluation"
    assert shown.splitlines()[0].startswith("REWARD HACKING: from step 10 to 20") and (folder / "hacking.png").exists()
    result, verdicts = result_of(run), read_jsonl(folder / "verdicts.jsonl")
    outcomes = Counter(row["outcome"] for row in verdicts)
    failures = read_json(folder / "failures.json")
    assert failures["outcomes"] == outcomes and result["hacking"] == "hacked" and outcomes["loss"] > 0
    collected = read_jsonl(folder / "failures" / "collect.jsonl")
    lost = {json.dumps(row["prompt"]) for row in verdicts if row["outcome"] == "loss"}
    assert len(collected) == len(lost) and {json.dumps(row["prompt"]) for row in collected} == lost
    pages = [(folder / "failures" / f"{name.replace(' ', '_')}.md").read_text() for name in result["failures"]]
    assert pages and all("(gold reward " in page for page in pages)
    work([f"run={run}", f"against={toy.MODEL}"])
    assert "not the reference" in read_json(next(folder.glob("against-*/result.json")))["parts"]["hacking"]


def test_without_verdicts_or_history_both_are_skipped_with_the_reason(run, capsys):  # noqa: F811
    work([f"run={run}", "parts=[failures,hacking]"])
    assert "failures skipped (no verdicts to read: they are those of the part win_rate)" in capsys.readouterr().out
    assert result_of(run)["parts"]["hacking"].startswith("skipped (no verdicts")


@needs_eval
def test_a_labelled_file_is_answered_once_by_both_models(run, tmp_path, monkeypatch, capsys):  # noqa: F811
    file = write_labelled(tmp_path / "labelled.jsonl")
    words = [f"run={run}", "parts=[domain]", f"domain.file={file}", "domain.max_new_tokens=24"]
    work(words)
    result, rows = result_of(run), read_jsonl(run / "evaluation" / "domain.jsonl")
    right = [sum(row[name]["read_as"] == row["target"] for row in rows) / 6 for name in ("run", "reference")]
    assert [result["domain_accuracy"], result["domain_accuracy"] - result["domain_accuracy_difference"]] == right
    assert right[1] == 1 and "accuracy, 6 rows of one's own" in capsys.readouterr().out
    monkeypatch.setattr(Candidate, "load", lambda self: pytest.fail("a model was loaded again"))
    write_jsonl(file, [{"prompt": row["prompt"], "reference": row["label"]} for row in read_jsonl(file)])
    work(words)
    assert result_of(run)["domain_exact_match"] == 0 and "domain_accuracy" not in result_of(run)


@pytest.mark.parametrize(
    ("policy", "other", "names"),
    [
        ("org/m", "org/n", ("m", "n")),
        ("runs/a b?", "../m", ("a_b_", "m")),
        ("a/m", "b/m", ("policy", "other")),
        ("/", "..", ("policy", "_")),
    ],
)
def test_models_have_names_that_files_can_have_and_not_the_same(policy, other, names):
    model = check(compose([])).model
    policy, other = Candidate(policy, model), Candidate(other, model)
    job = SimpleNamespace(policy=policy, opponent=other, reference=Candidate("its reference", model))
    assert tuple(each.name for each in models_of(job)) == names
    job.opponent = job.reference
    assert models_of(job)[1].name == "reference"


def test_alpaca_eval_waits_for_its_annotations_and_reads_them(run, tmp_path, capsys):  # noqa: F811
    write_json(tmp_path / "asked.json", [{"instruction": f"My {item} leaks."} for item in list(DESK_OF)[:3]])
    words = [
        f"run={run}",
        "parts=[alpaca_eval]",
        f"alpaca_eval.instructions={tmp_path / 'asked.json'}",
        "alpaca_eval.max_new_tokens=24",
    ]
    work(words)
    assert result_of(run)["parts"]["alpaca_eval"] == "waiting"
    assert capsys.readouterr().out.count("wait for their annotation: alpaca_eval --model_outputs") == 2
    for name, preference in (("run", 1.8), ("reference", 1.6)):
        folder = run / "evaluation" / "alpaca_eval" / name
        rows = read_json(folder / "model_outputs.json")
        annotated = [
            {"instruction": row["instruction"], "output_1": "b", "generator_1": "base", "output_2": row["output"],
             "generator_2": name, "annotator": "a", "preference": preference} for row in rows
        ]  # fmt: skip
        write_json(folder / "weighted_alpaca_eval_gpt4_turbo" / "annotations.json", annotated)
    work(words)
    result, shown = result_of(run), capsys.readouterr().out
    assert result["status"] == "done" and result["alpaca_eval_win_rate"] == pytest.approx(0.8)
    assert "AlpacaEval against base, 3 prompts" in shown and "+0.200" in shown and "wait for" not in shown


def test_mt_bench_is_asked_graded_and_shown_by_category(run, tmp_path, capsys):  # noqa: F811
    rows = [{"question_id": number, "category": category, "turns": ["My toaster leaks.", "My kettle hums."]}
            for number, category in enumerate(("writing", "stem"))]  # fmt: skip
    write_jsonl(tmp_path / "question.jsonl", rows)
    with scripted_server(lambda number, body: Turn("Fine.\n[[6]]" if number % 2 else "Good.\n[[8]]")) as server:
        judge = ["judge=llm", f"judge.base_url={server.base_url}", "judge.model=j", "judge.workers=1"]
        words = [f"run={run}", "parts=[mt_bench]", f"mt_bench.questions={tmp_path / 'question.jsonl'}", *judge]
        work([*words, "mt_bench.max_new_tokens=16"])
        asked = len(server.bodies)
        work([*words, "mt_bench.max_new_tokens=16"])
        assert len(server.bodies) == asked  # nothing is paid for twice
        for name in ("a", "b"):
            shutil.copytree(run, tmp_path / "sweep" / name, ignore=shutil.ignore_patterns("evaluation"))
        work([f"sweep={tmp_path / 'sweep'}", *words[1:], "mt_bench.max_new_tokens=16"])
        assert len(server.bodies) == 2 * asked  # b answers as a does, and both have one reference
    result = result_of(run)
    assert (result["status"], result["mt_bench_questions"]) == ("done", 2) and 6 <= result["mt_bench"] <= 8
    assert "… writing" in capsys.readouterr().out
    assert len(read_jsonl(run / "evaluation" / "mt_bench" / "model_answer" / "run.jsonl")) == 2


# --- the gate and the choice -------------------------------------------------------------------------------------


def constructed(wins):
    """A measure of the win rate that finds `wins[run]` of 40 prompts won, the others lost."""

    def measure(job):
        answers = Answer("a", False, "m"), Answer("b", False, "m")
        won = [number < wins[job.policy.name] for number in range(40)]
        verdicts = [Verdict("first", "second") if each else Verdict("second", "first") for each in won]
        compared = [Compared(str(n), f"prompt {n}", 0, *answers, verdict) for n, verdict in enumerate(verdicts)]
        rows = [{"prompt_id": each.prompt_id, "points": each.verdict.points} for each in compared]
        write_jsonl(job.folder / "verdicts.jsonl", rows)
        about = {"policy": job.policy.name, "opponent": job.opponent_name, "split": job.split, "settings": {}}
        judge = {"name": "constructed", "kind": "gold"}
        return {"status": "done", **about, "judge": judge, **win_rates(compared), "controls": [], "spend": {}}

    return measure


@needs_eval
def test_a_run_whose_gate_failed_is_rejected_even_where_its_win_rate_is_the_highest(
    trained,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    sweep = tmp_path / "sweep"
    for name in ("strong", "sane"):
        shutil.copytree(trained, sweep / name)
    monkeypatch.setattr(win_rate, "measure_win_rate", constructed({"strong": 39, "sane": 30}))
    work([f"sweep={sweep}", "parts=[win_rate]"])
    assert read_json(sweep / "best.json")["recommended"] == "strong"

    def run_harness(policy, reference, options, folder):
        lost = 12 if policy.name == "strong" else 0
        theirs = {str(number): 1.0 for number in range(200)}
        task = compare_task(
            "sums", "acc", {name: float(int(name) >= lost) for name in theirs}, theirs, options.max_regression
        )
        return {"harness": "0", "tasks": [vars(task)], "gate": decide_gate([task], options.max_regression)}

    monkeypatch.setattr(gate, "run_harness", run_harness)
    capsys.readouterr()
    work([f"sweep={sweep}", "parts=[win_rate,gate]"])
    best, shown = read_json(sweep / "best.json"), capsys.readouterr().out
    (rejected,) = (row for row in best["evidence"] if row["run"] == "strong")
    (why,) = rejected["why_not"]
    assert (
        best["recommended"] == "sane"
        and rejected["quality"] > 0.9
        and rejected["evaluation"]["gate"]["worst_task"] == "sums"
    )
    assert why.startswith("the regression gate failed on sums: difference to the reference -0.060 [")
    assert "REGRESSION GATE FAILED: -0.060" in shown and shown.index("REGRESSION") < shown.index(
        "strong: win rate 0.975"
    )


@pytest.mark.slow
def test_the_gate_of_a_sweep_scores_the_reference_once_and_a_damaged_run_is_rejected(
    trained,  # noqa: F811
    tmp_path,
    monkeypatch,
    capfd,
):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is in the extra eval")
    from tests.evaluate.test_harness import write_desks

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path / "cache"))
    sweep = tmp_path / "sweep"
    for name in ("damaged", "sound"):
        shutil.copytree(trained, sweep / name)
    for name, noise in (("damaged", 0.08), ("sound", 0.001)):
        torch.manual_seed(1)
        policy = LlamaForCausalLM.from_pretrained(toy.MODEL)
        for weights in policy.parameters():
            weights.data += noise * torch.randn_like(weights)
        policy.save_pretrained(sweep / name / "model")
    loaded, load = [], Candidate.load
    monkeypatch.setattr(Candidate, "load", lambda self: loaded.append(self.name) or load(self))
    tasks = write_desks(tmp_path / "tasks", 128)
    words = ["parts=[gate]", "gate.tasks=[desks]", f"gate.include_path=[{tasks}]"]
    work([f"sweep={sweep}", *words])
    assert Counter(loaded) == {"reference": 1, "damaged": 1, "sound": 1}
    gates = {name: read_json(sweep / name / "evaluation" / "result.json")["gate"] for name in ("damaged", "sound")}
    assert not gates["damaged"]["passed"] and gates["damaged"]["difference"] < -0.2 and gates["sound"]["passed"]
    best = read_json(sweep / "best.json")
    reasons = {row["run"]: " ".join(row["why_not"]) for row in best["evidence"]}
    assert "the regression gate failed on desks" in reasons["damaged"] and "gate" not in reasons["sound"]
    assert "fatal" not in capfd.readouterr().err  # what git says to the harness where there is no repository
    work([f"run={sweep / 'damaged'}", *words, "split=select"])
    shown = capfd.readouterr().out
    assert shown.startswith("REGRESSION GATE FAILED: -") and "desks, acc, 128 samples: failed" in shown
    rows = (sweep / "sound" / "evaluation" / "gate" / "desks.reference.jsonl").read_text().splitlines()
    assert len(rows) == 128 and "metrics" in json.loads(rows[0])
