"""`python -m dpo_kit evaluate`: what it writes, shows and refuses, and what a kill or a bad server leaves."""

import csv
import json
import random
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from markdown_it import MarkdownIt
from transformers import LlamaForCausalLM

from dpo_kit import compose, toy, train
from dpo_kit.config.compose import check
from dpo_kit.config.identity import comparable
from dpo_kit.errors import ConfigError, DataError, EvaluationError, JudgeError, ModelError
from dpo_kit.evaluate import evaluation, win_rate
from dpo_kit.evaluate.__main__ import main, work
from dpo_kit.evaluate.job import Candidate, plan
from dpo_kit.evaluate.part import Note, Part
from dpo_kit.evaluate.win_rate import Compared, write_samples
from dpo_kit.judge import correction
from dpo_kit.judge.answers import Answer
from dpo_kit.judge.review import ReviewSheet
from dpo_kit.judge.verdicts import FAKES, Shown, Verdict
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json, write_json, write_jsonl
from dpo_kit.run.report.markdown import fence
from tests.data.test_build import served_model, vote  # noqa: F401
from tests.judge.test_judges import parts as shown_parts
from tests.offline_wandb import log_files, read_offline
from tests.scripted_server import Turn, scripted_server, unreliable
from tests.small import few_pairs, write_pairs

RATE = "parts=[win_rate]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a run leaves that an evaluation reads, its policy the start with noise; 8 prompts in either split."""
    folder = tmp_path_factory.mktemp("trained")
    settings = check(compose(few_pairs(folder / "pairs.jsonl")))
    torch.manual_seed(0)
    policy = LlamaForCausalLM.from_pretrained(toy.MODEL)
    for weights in policy.parameters():
        weights.data += 0.01 * torch.randn_like(weights)
    policy.save_pretrained(folder / "run" / "model")
    write_json(folder / "run" / "manifest.json", {"config": comparable(settings), "command": None, "model": {}})
    measured = {"probe/kl_reverse_rb_nats": 2.0}
    result = {"status": "done", "method": "dpo", "beta": 0.1, "seed": 0, "final": measured, "start": {}}
    write_json(folder / "run" / "result.json", result)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def result_of(run):
    return read_json(run / "evaluation" / "result.json")


# --- what is written ---------------------------------------------------------------------------------------------


def test_a_run_is_measured_against_its_reference_and_the_same_command_draws_nothing_again(run, monkeypatch, capsys):
    work([f"run={run}", "win_rate.draws=2"])
    shown = capsys.readouterr().out
    result, verdicts = result_of(run), read_jsonl(run / "evaluation" / "verdicts.jsonl")
    assert result["status"] == "done" and result["split"] == "test" and result["judge"]["name"] == "gold dpo_kit.toy"
    assert result["win_rate_low"] <= result["win_rate"] <= result["win_rate_high"]
    assert result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"]
    pairs = read_jsonl(run / "evaluation" / "preferences.jsonl")
    margins = [row["logratio_chosen_nats"] - row["logratio_rejected_nats"] for row in pairs]
    assert len({row["pair_id"] for row in pairs}) == result["held_out_rows"] == len(pairs)
    assert result["accuracy"] == sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(margins)
    assert len(verdicts) == 2 * result["win_rate_prompts"] > 8 and f"next: {result['next']}" in shown
    rewards = [toy.gold_rewards([row["prompt"]] * 2, [row["policy"], row["opponent"]]) for row in verdicts]
    assert [row["points"] for row in verdicts] == [0.5 * ((a > b) + (a >= b)) for a, b in rewards]
    names = {"preferences.json", "win_rate.json", "samples.md", "evaluation.png"}
    assert names <= {file.name for file in (run / "evaluation").iterdir()}
    monkeypatch.setattr(Candidate, "load", lambda self: pytest.fail("a model was loaded again"))
    work([f"run={run}", "win_rate.draws=2", RATE])
    assert result_of(run) == result | {"next": result_of(run)["next"]}  # which names the words that were typed


@pytest.mark.fault("an evaluation killed while it samples and judges", promise="P4")
def test_an_evaluation_cut_anywhere_ends_with_the_same_verdicts(run):
    work([f"run={run}", RATE])
    folder = run / "evaluation"
    wanted, before = (folder / "verdicts.jsonl").read_bytes(), result_of(run)
    for name in ("answers.jsonl", "opponent_answers.jsonl"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: random.randrange(len(whole))])
    (folder / "verdicts.jsonl").unlink()
    work([f"run={run}", RATE])
    assert (folder / "verdicts.jsonl").read_bytes() == wanted and result_of(run) == before


def test_the_same_model_and_seed_is_a_tie_and_other_seeds_are_other_answers(tmp_path):
    words = [f"policy={toy.MODEL}", f"reference={toy.MODEL}", RATE, "win_rate.limit=12", "tracking=none"]
    work([*words, f"out={tmp_path / 'same'}"])
    same = read_jsonl(tmp_path / "same" / "verdicts.jsonl")
    assert all(row["policy"] == row["opponent"] and row["outcome"] == "tie" for row in same) and len(same) == 12
    work([*words, f"out={tmp_path / 'other'}", "win_rate.opponent_seed=1"])
    other = read_jsonl(tmp_path / "other" / "verdicts.jsonl")
    assert sum(row["policy"] != row["opponent"] for row in other) > 6
    assert [row["policy"] for row in other] == [row["policy"] for row in same]


@pytest.mark.slow
def test_an_adapter_is_evaluated_on_its_base(tmp_path):
    words = [*few_pairs(tmp_path / "pairs.jsonl"), "model.tuning=lora", "callbacks=none", "trl.learning_rate=1e-1"]
    train(compose(words), tmp_path / "run")
    work([f"run={tmp_path / 'run'}"])
    rows = read_jsonl(tmp_path / "run" / "evaluation" / "verdicts.jsonl")
    assert any(row["policy"] != row["opponent"] for row in rows) and result_of(tmp_path / "run")["margin_nats"] != 0
    outside = [f"policy={tmp_path / 'run' / 'model'}", "tracking=none", f"data.train={tmp_path / 'pairs.jsonl'}"]
    work(
        [
            *outside,
            "data.eval=null",
            "data.holdout=0.4",
            "callbacks=none",
            "trl.max_length=128",
            f"out={tmp_path / 'o'}",
        ]
    )
    known, found = result_of(tmp_path / "run"), read_json(tmp_path / "o" / "result.json")
    assert found["accuracy"] == known["accuracy"] and found["margin_nats"] == pytest.approx(
        known["margin_nats"], abs=1e-6
    )
    assert read_json(tmp_path / "o" / "preferences.json")["calibration"] is None  # with which beta, nobody said


def test_another_run_is_compared_pair_by_pair_and_leaves_the_choice_s_figures_alone(run, trained, capsys):
    work([f"run={run}"])
    before = result_of(run)
    work([f"run={run}", f"against={trained}"])
    folder = run / "evaluation" / "against-run"
    found = read_json(folder / "preferences.json")["against"]
    assert found["accuracy"]["difference"] == found["margin_nats"]["difference"] == 0  # a copy of itself
    assert read_json(folder / "result.json")["win_rate"] == 0.5 and result_of(run) == before
    assert "accuracy, less that of run" in capsys.readouterr().out


def test_the_other_split_goes_beside_the_one_that_a_choice_rests_on(run):
    work([f"run={run}", "split=select", RATE])
    work([f"run={run}", RATE])
    assert result_of(run)["split"] == "select"
    assert read_json(run / "evaluation" / "test" / "result.json")["split"] == "test"
    prompts = [{row["prompt_id"] for row in read_jsonl(path)} for path in run.rglob("verdicts.jsonl")]
    assert len(prompts) == 2 and not prompts[0] & prompts[1]


def test_without_a_judge_there_is_no_win_rate_and_the_command_for_one_is_named(run, capsys):
    manifest = read_json(run / "manifest.json")
    manifest["config"]["data"]["gold"] = None
    write_json(run / "manifest.json", manifest)
    work([f"run={run}"])
    result = result_of(run)
    assert "win_rate" not in result and result["accuracy"] is not None
    assert result["parts"]["win_rate"].startswith("skipped (no judge: say judge=llm")
    assert "judge=llm judge.base_url=" in capsys.readouterr().out.splitlines()[-1]


# --- answers files, people ---------------------------------------------------------------------------------------


def test_a_file_of_answers_is_an_opponent_and_what_it_lacks_is_named(run, tmp_path):
    work([f"run={run}", RATE])
    rows = read_jsonl(run / "evaluation" / "verdicts.jsonl")
    answers = tmp_path / "theirs.jsonl"
    write_jsonl(answers, [{"prompt": row["prompt"][0]["content"], "answer": "Go away."} for row in rows])
    work([f"run={run}", RATE, f"against={answers}"])
    result = read_json(run / "evaluation" / "against-theirs" / "result.json")
    assert result["opponent"] == str(answers) and result["win_rate_prompts"] == len(rows)
    write_jsonl(answers, read_jsonl(answers)[2:])
    with pytest.raises(DataError, match=rf"fewer than win_rate\.draws=1 answers to 2 of {len(rows)} prompts"):
        work([f"run={run}", RATE, f"against={answers}"])
    work([f"run={run}", RATE, f"against={answers}", f"win_rate.prompts={answers}"])
    result = read_json(run / "evaluation" / "against-theirs" / "result.json")
    assert result["win_rate_prompts"] == len(rows) - 2
    answers.write_text('{"prompt": "x", "output": "y"}\n')
    with pytest.raises(
        DataError, match=r"theirs\.jsonl:1: a row needs prompt and answer, got the columns prompt, output"
    ):
        work([f"run={run}", RATE, f"against={answers}"])


def test_people_judge_on_a_blinded_sheet_and_the_same_command_reads_it(run, capsys):
    words = [f"run={run}", RATE, "judge=human"]
    work(words)
    assert result_of(run)["status"] == "waiting" and result_of(run)["win_rate"] is None
    assert "fill in the column better of" in capsys.readouterr().out
    filled = vote(
        run / "evaluation" / "review.csv", lambda row: "1" if len(row["answer_1"]) > len(row["answer_2"]) else "2"
    )
    assert all("reference" not in json.dumps(row) and "policy" not in json.dumps(row) for row in filled)
    work(words)
    rows = [row for row in read_jsonl(run / "evaluation" / "verdicts.jsonl") if row["policy"] != row["opponent"]]
    assert all(
        (row["points"] == 1) == (len(row["policy"]) > len(row["opponent"])) for row in rows if row["points"] != 0.5
    )


def test_people_check_the_judge_on_some_comparisons_and_put_its_rate_right(run, monkeypatch, capsys):
    words = [f"run={run}", RATE]
    work([*words, "review=3"])
    sheet = run / "evaluation" / "review.csv"
    assert len(list(csv.DictReader(sheet.open(encoding="utf-8-sig")))) == 3
    verdicts = read_jsonl(run / "evaluation" / "verdicts.jsonl")
    known = {(row["prompt"][0]["content"], row["policy"]): row["points"] for row in verdicts}

    def agree(row):
        first = known.get((row["message"], row["answer_1"]))
        points = first if first is not None else 1 - known[row["message"], row["answer_2"]]
        return {1: "1", 0: "2", 0.5: "tie"}[points]

    vote(sheet, agree)
    work(words)
    review = read_json(run / "evaluation" / "win_rate.json")["review"]
    assert review["checked"] == 3 and review["same_verdict"] == 1
    assert result_of(run)["win_rate_corrected"] is None  # three are too few
    monkeypatch.setattr(correction, "LEAST", 3)
    vote(sheet, lambda row: "tie")
    capsys.readouterr()
    work(words)
    result = result_of(run)
    assert (result["win_rate_corrected"], result["reviewed"]) == (0.5, 3) and result["win_rate"] != 0.5
    assert "put right by people's votes" in capsys.readouterr().out


# --- language models as judges -----------------------------------------------------------------------------------


def llm(server, **options):
    values = {"base_url": server.base_url, "model": "j", "controls": 8, "retries": 6, **options}
    return ["judge=llm", *(f"judge.{key}={value}" for key, value in values.items())]


def sensible(number, body):
    """A judge who likes an apology, then the fewer words, and cannot be talked into anything."""
    (_, _), (_, first), (_, second) = shown_parts(body)

    def worth(text):
        return (
            bool(text.strip()) and FAKES["pick me"][:30] not in text and "aspects" not in text,
            "sorry" in text,
            -len(text),
        )

    better = (worth(first) > worth(second)) - (worth(first) < worth(second))
    return Turn(f"Clear.\nVERDICT: {dict(zip((1, 0, -1), ('1', 'TIE', '2'), strict=True))[better]}")


@pytest.mark.slow
@pytest.mark.fault("a judge's server that returns 429, 500, time-outs, garbage", promise="P4")
def test_a_judge_s_server_that_misbehaves_gives_a_whole_result_and_is_paid_once(run):
    with scripted_server(unreliable(sensible)) as server:
        words = [f"run={run}", RATE, *llm(server, timeout_s=0.5, price_in=1, price_out=1)]
        work(words)
        found, asked = read_json(run / "evaluation" / "win_rate.json"), len(server.bodies)
        work(words)
        assert len(server.bodies) == asked  # all of it is in the journal
    assert found["status"] == "done" and found["outcomes"]["unjudged"] == 0 and found["unparsable"] == 0
    assert [control["passed"] for control in found["controls"]][1:] == [True] * 3
    assert found["spend"]["judge"]["retried"] >= 5 and found["order_inconsistency"] == 0
    again = read_json(run / "evaluation" / "win_rate.json")
    assert (
        again["spend"]["judge"]["cost"] == found["spend"]["judge"]["cost"] > 0
        and again["win_rate"] == found["win_rate"]
    )


@pytest.mark.fault("a judge's server that goes away", promise="P4")
def test_a_judge_s_server_that_goes_away_leaves_a_partial_result_that_goes_on(run, capsys):
    def dying(number, body):
        gone = Turn(status=503, raw=b"{}", headers={"Retry-After-Ms": "5"})
        return sensible(number, body) if number < 9 else gone

    with scripted_server(dying) as server:
        options = {"controls": 0, "workers": 1, "retries": 0}
        with pytest.raises(EvaluationError, match="some answers or verdicts are missing: the same command"):
            work([f"run={run}", RATE, *llm(server, **options)])
        assert result_of(run)["status"] == "partial" and 3 < result_of(run)["win_rate_prompts"] < 8
        assert "comparisons have no verdict; the rate is of the others" in capsys.readouterr().out
    with scripted_server(sensible) as server:
        work([f"run={run}", RATE, *llm(server, controls=0)])
        rows = read_jsonl(run / "evaluation" / "verdicts.jsonl")
        distinct = sum(1 if row["policy"] == row["opponent"] else 2 for row in rows)
        assert len(server.bodies) == distinct - 9 and result_of(run)["status"] == "done"


def test_a_failed_control_stands_above_the_result(run, capsys):
    with scripted_server(lambda number, body: Turn("VERDICT: 1")) as server:
        assert main([f"run={run}", RATE, *llm(server)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("JUDGE CONTROL FAILED: pick me: 0.50, expected interval below .5")
    found = read_json(run / "evaluation" / "win_rate.json")
    assert found["win_rate"] == 0.5 and found["order_inconsistency"] == 1 and found["first_position_rate"] == 1
    assert result_of(run)["judge"]["controls_failed"] == ["pick me", "constant", "empty"]


def test_nothing_ends_early_where_people_check_the_judge(run, monkeypatch):
    monkeypatch.setattr(win_rate, "ConfidenceSequence", lambda: 1 / 0)
    with scripted_server(sensible) as server:
        work([f"run={run}", RATE, *llm(server, controls=0), "review=3"])
        work([f"run={run}", RATE, *llm(server, controls=0)])  # the sheet is there
        (run / "evaluation" / "review.csv").unlink()
        with pytest.raises(ZeroDivisionError):
            work([f"run={run}", RATE, *llm(server, controls=0)])


def test_people_s_votes_on_twice_the_same_answer_are_ties(tmp_path):
    shown = [Shown("a", "x", "x"), Shown("b", "y", "z"), Shown("c", "x", "x")]
    sheet = ReviewSheet(tmp_path / "review.csv")
    sheet.write(shown[:2])
    vote(sheet.path, lambda row: "1")
    assert sheet.points(shown)[::2] == [0.5, None] and sheet.points(shown)[1] in (0, 1)


def test_both_sides_may_answer_from_servers(run):
    def talk(number, body):
        return Turn("I am sorry." if body["model"] == "ours" else "Go away.") if "model" in body else Turn("")

    with scripted_server(talk) as server:
        where = [f"win_rate.{side}_server={{base_url: '{server.base_url}', model: {name}}}"
                 for side, name in (("policy", "ours"), ("opponent", "theirs"))]  # fmt: skip
        work([f"run={run}", RATE, *where])
        asked = Counter(body["model"] for body in server.bodies)
    verdicts = read_jsonl(run / "evaluation" / "verdicts.jsonl")
    assert asked == {"ours": len(verdicts), "theirs": len(verdicts)}
    assert {(row["policy"], row["opponent"]) for row in verdicts} == {("I am sorry.", "Go away.")}


# --- sweeps ------------------------------------------------------------------------------------------------------


def test_a_sweep_is_evaluated_on_the_select_split_with_one_set_of_reference_answers(
    trained, tmp_path, monkeypatch, capsys
):
    sweep = tmp_path / "sweep"
    for name in ("a", "b"):
        shutil.copytree(trained, sweep / name)
    shutil.copytree(trained, sweep / "failed")
    write_json(sweep / "failed" / "result.json", {"status": "failed"})
    loaded, load = [], Candidate.load
    monkeypatch.setattr(Candidate, "load", lambda self: loaded.append(self.name) or load(self))
    work([f"sweep={sweep}", RATE])
    assert Counter(loaded) == {"its reference": 1, "a": 1, "b": 1}
    for name in ("a", "b"):
        result = read_json(sweep / name / "evaluation" / "result.json")
        assert result["split"] == "select" and result["win_rate"] is not None
    assert not (sweep / "failed" / "evaluation").exists()
    best = read_json(sweep / "best.json")
    cited = {each["run"]: each["evaluation"] for each in best["evidence"]}
    assert cited["a"]["file"] == "a/evaluation/result.json" and cited["a"]["win_rate"] == result["win_rate"]
    shown = capsys.readouterr().out
    assert shown.startswith("a: win rate ") and "recommended" in shown.lower()


# --- parts, tracker, pages ---------------------------------------------------------------------------------------


def test_a_further_part_is_one_entry_of_the_table(run, monkeypatch, capsys):
    gate = {"passed": False, "worst_task": "sums", "difference": -0.2, "low": -0.3, "high": -0.1, "limit": 0.03}

    class Extra(Part):
        def measure(self, job):
            return {"status": "done", "gate": gate, "at": str(job.policy.name)}

        def headline(self, found):
            return {"gate": found["gate"]}

        def tell(self, found):
            return [("gate", "failed", ""), Note("GATE FAILED", first=True)]

    monkeypatch.setitem(evaluation.PARTS, "benchmarks", Extra())
    work([f"run={run}", "parts=[win_rate,benchmarks]"])
    assert capsys.readouterr().out.splitlines()[0] == "GATE FAILED"
    assert result_of(run)["gate"] == gate and result_of(run)["win_rate"] is not None
    monkeypatch.setattr("dpo_kit.run.report.page.page_text", lambda _: 1 / 0)  # a page that fails costs no measurement
    work([f"run={run}", "parts=[preferences]"])  # what was measured earlier stays
    assert result_of(run)["gate"] == gate and result_of(run)["accuracy"] is not None
    assert read_json(run / "evaluation" / "benchmarks.json")["at"] == "run"


def test_the_tracker_s_run_is_resumed_by_its_id(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    work([f"run={run}", RATE])
    assert not log_files(run)  # this run had no wandb run
    known = RunDirectory(run).wandb_id()
    work([f"run={run}", RATE])
    (file,) = log_files(run)
    found = read_offline(file)
    assert found.run.run_id == known and found.summary["evaluation/win_rate"] == result_of(run)["win_rate"]
    assert any("evaluation/picture" in row for row in map(str, found.history))


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "```\n# heading\n```",
        "~~~\n</td></tr></table>\n~~~",
        "````` five `````\n\n</td>",
        "\r```\r<script>",
        "",
        "<!--",
    ],
)
def test_no_answer_gets_out_of_its_fence(text, tmp_path):
    answers = (Answer(text, False, "m"), Answer("other", True, "n"))
    compared = Compared("p", "Which `one`?", 0, *answers, Verdict("second", "first"))
    write_samples(tmp_path / "samples.md", [compared] * 2, policy="p|o<b>l", opponent="ref")
    tokens = MarkdownIt().parse((tmp_path / "samples.md").read_text())
    fences = [token.content for token in tokens if token.type == "fence"]
    clean = text.replace("\r", "\n")
    assert fences == ["Which `one`?\n", clean + "\n", "other\n"] * 2
    assert [token.content for token in tokens if token.type == "html_block"].count("</td>\n</tr></table>\n") == 2
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2", "h2"]


def test_a_secret_in_an_answer_is_not_written():
    assert "hf_" not in fence("the key is hf_abcdefghijklmnopqrstuv")


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["outputs/x"], r"arguments are key=value, got outputs/x; did you mean run=outputs/x\?"),
        ([], r"say one of run=DIR, sweep=DIR and policy=… reference=…, got none of them"),
        (["run=a", "sweep=b"], "got run and sweep"),
        (["runs=a"], r"unknown key runs; did you mean run\?"),
        (["run=a", "win_rate.limt=3"], r"unknown key win_rate\.limt; did you mean win_rate\.limit\?"),
        (["run=nowhere"], "nowhere is no run directory"),
        (["run=a", "reference=b"], r"reference=b goes with policy=.*did you mean against=\?"),
        (["policy=b"], "reference is missing"),
        (["sweep=nowhere"], "sweep=nowhere is not a folder"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_loaded(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, DataError), match=said):
        plan(words)
    assert not list(tmp_path.iterdir())


def test_what_belongs_to_the_run_or_means_something_else_is_refused(run, tmp_path):
    for words, said in (
        ([f"run={run}", "trl.max_length=9"], "trl.max_length=9: this is taken from the manifest of"),
        ([f"run={run}", "parts=[win_rat]"], r"parts must be among .*, got win_rat; did you mean win_rate\?"),
        ([f"run={run}", "split=train"], r"split: .*'select', 'test' or 'all'"),
        ([f"run={run}", "win_rate.limit=0"], r"win_rate\.limit: .*greater than 0"),
        ([f"run={run}", "judge=llm", "judge.model=m"], r"judge\.base_url is missing"),
        ([f"run={run}", f"against={tmp_path}"], "is neither a run directory nor a model nor a file of answers"),
        ([f"run={run / 'model'}"], rf"did you mean run={run}\?"),
        ([f"run={run.parent}"], f"it is a sweep, say sweep={run.parent}"),
        ([f"policy={run}", "reference=x"], f"is a run directory: say run={run}"),
        ([f"sweep={run.parent}", "out=x"], "out=x goes with run= or policy="),
    ):
        with pytest.raises((ConfigError, ModelError), match=said):
            work(words)
    write_json(run / "result.json", {"status": "failed"})
    with pytest.raises(ConfigError, match="has not ended well"):
        work([f"run={run}"])


def test_help_names_every_key_and_imports_nothing_heavy(command):
    shown = command("evaluate", "--help")
    assert shown.returncode == 0 and "opponent_seed: ${.seed}" in shown.stdout and "against: null" in shown.stdout
    loaded = "{'torch', 'trl', 'transformers', 'wandb'} & set(sys.modules)"
    probe = f"import sys, dpo_kit.evaluate.__main__; sys.exit(bool({loaded}))"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0


# --- whole ways --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_run_beats_its_reference_and_an_untrained_copy_does_not(command, tmp_path):
    assert command("hydra.run.dir=run", "tracking=none").returncode == 0
    done = command("evaluate", "run=run")
    assert done.returncode == 0 and "Warning" not in done.stderr and "run is better than its reference" in done.stdout
    result = result_of(tmp_path / "run")
    assert result["win_rate_low"] > 0.5 and result["accuracy_low"] > 0.5 and result["win_rate_prompts"] > 200


@pytest.mark.slow
def test_the_interval_of_an_untrained_copy_covers_one_half_in_18_to_20_of_20_repeats(tmp_path):
    shutil.copytree(toy.MODEL, tmp_path / "copy")
    covered, rates = 0, []
    for repeat in range(20):
        words = [f"policy={tmp_path / 'copy'}", f"reference={toy.MODEL}", RATE, "tracking=none", "win_rate.limit=160"]
        seeds = [f"win_rate.seed={2 * repeat}", f"win_rate.opponent_seed={2 * repeat + 1}"]
        work([*words, *seeds, f"out={tmp_path / str(repeat)}"])
        result = read_json(tmp_path / str(repeat) / "result.json")
        covered += result["win_rate_low"] <= 0.5 <= result["win_rate_high"]
        rates.append(result["win_rate"])
    assert 18 <= covered <= 20 and len(set(rates)) > 10, rates


@pytest.mark.slow
def test_an_overtuned_run_that_lost_its_capability_is_rejected(command, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 400)
    words = ["tracking=none", f"data.train={pairs}", "callbacks.prompts=64", "callbacks.pairs=64"]
    overtuned = ["trl.num_train_epochs=8", "trl.learning_rate=3e-3", "allow_learning_rate=true"]
    assert command(*words, "hydra.run.dir=sweep/sane", "trl.num_train_epochs=2").returncode == 0
    assert command(*words, "hydra.run.dir=sweep/overtuned", *overtuned).returncode == 0
    done = command("evaluate", "sweep=sweep", "win_rate.limit=64")
    assert done.returncode == 0 and "Recommended: sane" in done.stdout
    best = read_json(tmp_path / "sweep" / "best.json")
    (rejected,) = (row for row in best["evidence"] if row["run"] == "overtuned")
    assert any(why.startswith("capability fell by") for why in rejected["why_not"]) and not rejected["eligible"]


@pytest.mark.slow
def test_a_real_server_answers_and_judges(served_model, run):  # noqa: F811
    server = f"win_rate.policy_server={{base_url: '{served_model}', model: {toy.MODEL}}}"
    judge = ["judge=llm", f"judge.base_url={served_model}", f"judge.model={toy.MODEL}", "judge.controls=2"]
    words = [f"run={run}", RATE, server, *judge, "judge.max_tokens=32", "win_rate.max_new_tokens=32"]
    with pytest.raises(JudgeError, match=r"keeps to no form of verdict.*judge\.max_tokens=32"):  # it is no judge
        work(words)
    assert len((run / "evaluation" / "answers.jsonl").read_bytes().splitlines()) == 8
    journal = (run / "evaluation" / "judgements.jsonl").read_bytes()
    with pytest.raises(JudgeError):
        work(words)
    assert (run / "evaluation" / "judgements.jsonl").read_bytes() == journal
