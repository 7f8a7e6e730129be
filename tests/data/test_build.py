"""Pairs from prompts: every prompt accounted for, whatever dies on the way."""

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter

import pytest

from dpo_kit import toy
from dpo_kit.config.building import Build
from dpo_kit.config.settings import Data
from dpo_kit.data.__main__ import compose_tool
from dpo_kit.data.build.pairs import OUTCOMES, build_pairs, pair_answers, show_build
from dpo_kit.data.build.prompts import read_prompts
from dpo_kit.errors import BuildError, ConfigError, DataError
from dpo_kit.judge.answers import Answer
from dpo_kit.judge.open import fence
from tests.judge.test_judges import parts
from tests.scripted_server import Turn, scripted_server, unreliable

PLACE = "My toaster leaks."


def cfg(out, *overrides):
    return compose_tool([f"out={out}", *overrides])


def server_source(base_url, **options):
    """The override that lets a server answer; quoted for Hydra."""
    values = {"base_url": f"'{base_url}'", "model": "m", "retries": 2, **options}
    return "build.answers=[{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}]"


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def accounted(report):
    return sum(report["prompts"][name] for name in OUTCOMES) == report["prompts"]["in"]


def helpful(number, body):
    """Answers that differ in their gold reward, by the seed of the request."""
    endings = ("Tighten the seal.", "Oil the motor.", "That is your own fault.", "")
    return Turn("Here is our answer. " + endings[body["seed"] % 3])


# --- local models ------------------------------------------------------------------------------------------------

SMALL = ("build.limit=40",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A build that nothing interrupted, and its report."""
    out = tmp_path_factory.mktemp("whole")
    return out, build_pairs(cfg(out, *SMALL))


def test_pairs_of_the_embedded_model_follow_the_gold_reward(whole):
    out, report = whole
    pairs = read_jsonl(out / "pairs.jsonl")
    assert report["status"] == "done" and accounted(report) and report["prompts"]["in"] == 40
    assert len(pairs) == report["pairs"] == report["prompts"]["pair"] > 20
    prompts = [pair["prompt"] for pair in pairs]
    for name in ("chosen", "rejected"):
        rewards = toy.gold_rewards(prompts, [pair[name][-1]["content"] for pair in pairs])
        assert rewards == [pair[f"score_{name}"] for pair in pairs]
    assert all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)
    assert json.loads((out / "build_report.json").read_text())["pairs"] == len(pairs)


@pytest.mark.fault("a build killed while it writes", promise="P4")
def test_a_build_cut_anywhere_ends_with_the_same_bytes(whole, tmp_path):
    out, _ = whole
    journal, wanted = (out / "answers.jsonl").read_bytes(), digest(out / "pairs.jsonl")
    again = tmp_path / "again"
    again.mkdir()
    (again / "answers.jsonl").write_bytes(journal[: random.randrange(len(journal))])
    (again / "manifest.json").write_bytes((out / "manifest.json").read_bytes())
    build_pairs(cfg(again, *SMALL))
    assert digest(again / "pairs.jsonl") == wanted
    assert len(read_jsonl(again / "answers.jsonl")) == len(read_jsonl(out / "answers.jsonl")) == 80
    build_pairs(cfg(tmp_path / "other", *SMALL, "seed=1"))
    assert digest(tmp_path / "other" / "pairs.jsonl") != wanted  # so that equal bytes mean something


def test_a_folder_holds_one_build_and_the_other_is_refused_with_its_keys(whole):
    out, _ = whole
    with pytest.raises(ConfigError, match=r"build\.max_new_tokens: 64 there, 32 now") as refused:
        build_pairs(cfg(out, *SMALL, "build.max_new_tokens=32", "seed=1"))
    assert "seed: 0 there, 1 now" in str(refused.value) and "undecided" not in str(refused.value)


def test_the_same_command_finds_its_folder_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["build.limit=4"]
    folders = {build_pairs(compose_tool([*words, *more]))["folder"] for more in ([], [], ["seed=1"])}
    assert len(folders) == 2 and {path.parent.name for path in tmp_path.glob("outputs/build-*/pairs.jsonl")} == {
        folder.removeprefix("outputs/") for folder in folders
    }


def test_greedy_draws_are_the_same_answer_and_no_pair(tmp_path):
    greedy = "build.answers=[{path: ${model.path}, temperatures: [0], draws: 2}]"
    report = build_pairs(cfg(tmp_path, "build.limit=4", greedy))
    assert report["prompts"] == {"in": 4, **dict.fromkeys(OUTCOMES, 0), "identical": 4}
    assert (tmp_path / "pairs.jsonl").read_text() == ""


def test_several_temperatures_are_several_sources(tmp_path):
    two = "build.answers=[{path: ${model.path}, temperatures: [0.3, 1.5], draws: 1}]"
    report = build_pairs(cfg(tmp_path, "build.limit=30", two))
    answers = read_jsonl(tmp_path / "comparisons.jsonl")
    assert len(report["sources"]) == 2 and accounted(report)
    cold, hot = sorted(report["sources"])
    assert {row["source_a"] for row in answers} == {cold} and {row["source_b"] for row in answers} == {hot}
    assert report["sources"][cold]["chosen"] + report["sources"][hot]["chosen"] == report["pairs"]


def test_a_model_s_own_way_to_sample_is_followed_where_it_is_asked_for(tmp_path):
    model = shutil.copytree(toy.MODEL, tmp_path / "model")
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": False}))
    one = f"build.answers=[{{path: {model}, temperatures: [null], draws: 2}}]"
    report = build_pairs(cfg(tmp_path / "own", "build.limit=4", one))
    assert report["prompts"]["identical"] == 4 and [*report["sources"]] == [f"{model} as it samples"]
    nearly_greedy = "build.answers=[{path: ${model.path}, top_p: 0.001, draws: 2}]"
    assert build_pairs(cfg(tmp_path / "p", "build.limit=4", nearly_greedy))["prompts"]["identical"] == 4


def test_answers_that_were_cut_are_said_and_how_many_of_them_are_chosen(tmp_path, capsys):
    show_build(build_pairs(cfg(tmp_path, "build.limit=12", "build.max_new_tokens=16")))
    cut = [row["text"] for row in read_jsonl(tmp_path / "answers.jsonl") if row["cut"]]
    chosen = [pair["chosen"][-1]["content"] for pair in read_jsonl(tmp_path / "pairs.jsonl")]
    count = sum(text in cut for text in chosen)
    shown = " ".join(capsys.readouterr().out.split())
    assert 0 < count < len(chosen) < len(cut) < 24
    assert f"{len(cut)} of 24 at build.max_new_tokens=16, {count} of them chosen: raise it" in shown


def test_the_embedded_model_says_so_where_it_answers_prompts_that_are_not_its_own(tmp_path, caplog):
    (tmp_path / "mine.jsonl").write_text(toy.TRAIN.read_text().splitlines()[0])
    build_pairs(cfg(tmp_path / "toy", "build.limit=1"))
    assert not caplog.records
    build_pairs(cfg(tmp_path / "mine", f"build.prompts={tmp_path / 'mine.jsonl'}"))
    assert "the embedded model answers" in caplog.text and "model=local model.path=" in caplog.text


# --- servers -----------------------------------------------------------------------------------------------------


def test_what_is_not_set_is_left_to_the_server(tmp_path):
    with scripted_server(helpful) as server:
        options = {"temperatures": "[null, 0.5]", "top_p": "0.9", "draws": "1"}
        build_pairs(cfg(tmp_path, "build.limit=2", server_source(server.base_url, **options)))
        sent = sorted((body.get("temperature"), body.get("top_p")) for body in server.bodies if "temperature" in body)
        assert sent == [(0.5, 0.9)] * 2 and len(server.bodies) == 4
        assert all(body["top_p"] == 0.9 for body in server.bodies)


def test_a_server_s_answers_become_pairs(tmp_path):
    with scripted_server(helpful) as server:
        report = build_pairs(cfg(tmp_path, "build.limit=20", server_source(server.base_url)))
        assert len(server.bodies) == 40 and len({body["seed"] for body in server.bodies}) == 40
        build_pairs(cfg(tmp_path, "build.limit=20", server_source(server.base_url, workers=9, max_cost=3)))
        assert len(server.bodies) == 40  # what is only about speed and cost is not another build
    assert report["status"] == "done" and accounted(report) and report["pairs"] > 5
    assert report["spend"]["answers"][0]["replies"] == 40


@pytest.mark.fault("a server that returns 429, 500, time-outs, garbage", promise="P4")
def test_a_build_from_a_server_that_misbehaves_is_complete(tmp_path):
    with scripted_server(unreliable(helpful)) as server:
        source = server_source(server.base_url, timeout_s=0.5, retries=6)
        report = build_pairs(cfg(tmp_path, "build.limit=12", source))
    assert report["status"] == "done" and accounted(report) and report["spend"]["answers"][0]["retried"] >= 5
    assert (
        sum(server.answered.values()) == len(server.answered) + server_timeouts(server) == 24 + server_timeouts(server)
    )


def server_timeouts(server):
    """Completions that came too late for whoever asked."""
    return sum(count - 1 for count in server.answered.values())


@pytest.mark.fault("a server that goes away", promise="P4")
def test_a_build_whose_server_went_away_is_partial_and_goes_on(tmp_path):
    def dying(number, body):
        gone = Turn(status=503, raw=b"{}", headers={"Retry-After-Ms": "5"})
        return helpful(number, body) if number < 15 else gone

    with scripted_server(dying) as server:
        words = ["build.limit=20", server_source(server.base_url, workers=1)]
        report = build_pairs(cfg(tmp_path, *words))
        assert report["status"] == "partial" and accounted(report) and report["prompts"]["failed"] == 20 - 15 // 2
        with pytest.raises(BuildError, match=r"13 of 20 prompts lack an answer .*not asked: 5 requests failed"):
            show_build(report)
        people = build_pairs(cfg(tmp_path / "people", *words, "judge=human"))
        assert people["status"] == "partial"  # answers are missing, not votes
        words[1] = words[1].replace("workers: 1", "workers: 1, timeout_s: 60")
        assert build_pairs(cfg(tmp_path, *words))["status"] == "partial"  # it asks again, and is refused again
        manifest = (tmp_path / "manifest.json").read_text()
    with scripted_server(helpful) as server:  # the same server at another port, as far as the build can know
        (tmp_path / "manifest.json").write_text(manifest.replace(words[1].split("'")[1], server.base_url))
        report = build_pairs(cfg(tmp_path, "build.limit=20", server_source(server.base_url)))
        assert report["status"] == "done" and len(server.bodies) == 40 - 15


def test_a_judge_that_always_takes_the_first_makes_no_pair_and_its_failed_controls_are_shown(tmp_path, capsys):
    def always_first(number, body):
        return Turn("VERDICT: 1") if parts(body) else helpful(number, body)

    with scripted_server(always_first) as server:
        judge = ["judge=llm", f"judge.base_url={server.base_url}", "judge.model=j", "judge.controls=5"]
        report = build_pairs(cfg(tmp_path, "build.limit=20", server_source(server.base_url), *judge))
    assert report["pairs"] == 0 and report["prompts"]["order-dependent"] > 5 and accounted(report)
    assert report["judge"]["first_position_rate"] == 1 and report["judge"]["order_agreement"] == 0
    assert [control["passed"] for control in report["controls"]] == [True, False, False, False]
    show_build(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "judge control failed: pick me: 0.50, expected interval below .5"


def test_a_language_model_judges_by_its_verdicts(tmp_path):
    def prefers_seal(number, body):
        if not parts(body):
            return helpful(number, body)
        (_, _), (_, first), (_, second) = parts(body)
        better = [text for text in (first, second) if "seal" in text]
        return Turn("TIE, I think" if len(better) != 1 else f"Clear.\nVERDICT: {1 + (better[0] == second)}")

    with scripted_server(prefers_seal) as server:
        judge = ["judge=llm", f"judge.base_url={server.base_url}", "judge.model=j", "judge.controls=0"]
        report = build_pairs(cfg(tmp_path, "build.limit=20", server_source(server.base_url), *judge))
    pairs = read_jsonl(tmp_path / "pairs.jsonl")
    assert pairs and all("seal" in pair["chosen"][0]["content"] for pair in pairs) and accounted(report)
    assert report["judge"]["unparsable"] == 2 * report["prompts"]["tie"] > 0
    assert report["spend"]["judge"]["replies"] == 2 * report["judge"]["comparisons"]


def test_answers_without_text_are_counted_and_make_no_pair(tmp_path):
    with scripted_server(lambda number, body: Turn("" if body["seed"] % 2 else "Tighten the seal.")) as server:
        report = build_pairs(cfg(tmp_path, "build.limit=20", server_source(server.base_url)))
    assert report["pairs"] == 0 and accounted(report)
    assert report["prompts"]["empty"] + report["prompts"]["identical"] == 20 and report["answers"]["empty"] > 0


KILLED = ["-m", "dpo_kit", "data", "mode=build", "build.limit=30"]


@pytest.mark.fault("SIGKILL in the middle of a build", promise="P4")
def test_a_build_killed_halfway_goes_on(tmp_path):
    with scripted_server(lambda *given: Turn(helpful(*given).text, seconds=0.03)) as server:
        command = [sys.executable, *KILLED, f"out={tmp_path / 'out'}", server_source(server.base_url)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and sum(server.answered.values()) < 30:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert len(server.answered) == 60 and sum(server.answered.values()) <= 60 + 4  # four workers
    report = json.loads((tmp_path / "out" / "build_report.json").read_text())
    keys = Counter(row["key"] for row in read_jsonl(tmp_path / "out" / "answers.jsonl"))
    assert len(keys) == 60 == keys.total() and accounted(report)
    prompts = Counter(json.dumps(pair["prompt"]) for pair in read_jsonl(tmp_path / "out" / "pairs.jsonl"))
    assert set(prompts.values()) == {1} and len(prompts) == report["pairs"]
    assert f"next: python -m dpo_kit data=jsonl data.train={tmp_path / 'out' / 'pairs.jsonl'}" in done.stdout


# --- people ------------------------------------------------------------------------------------------------------


def vote(sheet, decide):
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    with sheet.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | {"better": decide(row)} for row in rows)
    return rows


def longer(row):
    return "1" if len(row["answer_1"]) > len(row["answer_2"]) else "2"


def test_people_fill_in_the_sheet_and_the_same_command_makes_the_pairs(tmp_path, capsys):
    with scripted_server(helpful) as server:
        words = ["build.limit=12", "judge=human", server_source(server.base_url)]
        report = build_pairs(cfg(tmp_path, *words))
        assert report["status"] == "waiting" and report["pairs"] == 0 and accounted(report)
        show_build(report)
        assert "fill in the column better of" in capsys.readouterr().out
        rows = vote(tmp_path / "review.csv", longer)
        report = build_pairs(cfg(tmp_path, *words))
    pairs = read_jsonl(tmp_path / "pairs.jsonl")
    assert report["status"] == "done" and len(pairs) == len(rows) == report["pairs"]
    assert all(len(pair["chosen"][0]["content"]) > len(pair["rejected"][0]["content"]) for pair in pairs)


def test_people_check_the_judge_on_some_comparisons(tmp_path):
    with scripted_server(helpful) as server:
        words = ["build.limit=30", server_source(server.base_url)]
        report = build_pairs(cfg(tmp_path, *words, "build.review=8"))
        assert report["review"]["checked"] == 0
        rows = vote(tmp_path / "review.csv", lambda row: "1" if "seal" in row["answer_1"] else "tie")
        report = build_pairs(cfg(tmp_path, *words))  # once there is a sheet it is read
    verdicts = {
        (row["prompt"][0]["content"], frozenset((row["a"], row["b"]))): row["a"]
        if row["outcome"] == "win"
        else row["b"]
        for row in read_jsonl(tmp_path / "comparisons.jsonl")
        if row["outcome"] != "tie"
    }
    voted = vote(tmp_path / "review.csv", lambda row: row["better"])
    won = [row["answer_1"] if row["better"] == "1" else None for row in voted]
    known = [verdicts.get((row["message"], frozenset((row["answer_1"], row["answer_2"])))) for row in voted]
    same = sum(one == other for one, other in zip(won, known, strict=True))
    assert report["review"]["checked"] == len(rows) == 8
    assert report["review"]["same_verdict"] == same / 8


# --- pairing -----------------------------------------------------------------------------------------------------


class Ranked:
    """A judge with a table: who beats whom; scores of its own."""

    name = "ranked"

    def __init__(self, beats, always_first=()):
        self.beats, self.always_first = beats, always_first

    def decide(self, shown):
        return [self._one(each.first, each.second) for each in shown]

    def _one(self, first, second):
        if {first, second} in self.always_first:
            return "first"
        return "first" if (first, second) in self.beats else "second" if (second, first) in self.beats else "tie"

    def scores(self, prompts, answers):
        return None


BUILD = {**compose_tool([]).build, "answers": [{"path": "x"}]}


def build(**options):
    return Build(**BUILD | options)


def paired(judge, texts, seed=0, **options):
    answers = [[None if text is None else Answer(text, False, "m") for text in texts]]
    return pair_answers(judge, ["p"], answers, build(**options), seed)


def sides(found):
    return {(pair["chosen"], pair["rejected"]) for pair in found.pairs}


def test_best_and_worst_of_three_make_the_pair():
    found = paired(Ranked({("b", "a"), ("b", "c"), ("c", "a")}), ["a", "b", "c"])
    assert sides(found) == {("b", "a")} and found.outcomes == {"pair": 1} and len(found.comparisons) == 3


def test_all_pairs_are_those_that_the_judge_tells_apart():
    found = paired(Ranked({("b", "a"), ("c", "a")}), ["a", "b", "c"], pairs="all")
    assert sides(found) == {("b", "a"), ("c", "a")} and found.outcomes == {"pair": 1}


def test_equally_good_answers_are_parted_by_a_seeded_coin_that_is_counted():
    judge = Ranked({("b", "a"), ("c", "a")})  # b and c tie for the best
    found = {seed: paired(judge, ["a", "b", "c"], seed=seed) for seed in range(40)}
    assert all(each.coins == {"equally many wins": 1} for each in found.values())
    assert {next(iter(sides(each))) for each in found.values()} == {("b", "a"), ("c", "a")}
    assert sides(found[3]) == sides(paired(judge, ["a", "b", "c"], seed=3))


@pytest.mark.parametrize(
    ("judge", "texts", "outcome"),
    [
        (Ranked(set()), ["a", "b"], "tie"),
        (Ranked(set(), always_first=[{"a", "b"}]), ["a", "b"], "order-dependent"),
        (Ranked(set()), ["a", "a", "a"], "identical"),
        (Ranked(set()), ["a", " \n"], "empty"),
        (Ranked(set()), ["a", None, "b"], "failed"),
        # b wins twice and d once, yet d beats b: c and a are in between
        (Ranked({("b", "a"), ("b", "c"), ("d", "b"), ("a", "d"), ("c", "d")}), ["a", "b", "c", "d"], "intransitive"),
    ],
)
def test_each_prompt_has_one_outcome(judge, texts, outcome):
    found = paired(judge, texts)
    assert found.outcomes == {outcome: 1} and found.pairs == []


@pytest.mark.parametrize("judge", [Ranked(set()), Ranked(set(), always_first=[{"a", "b"}])])
def test_undecided_pairs_by_coin_are_marked_and_counted(judge):
    found = [paired(judge, ["a", "b"], seed=seed, undecided="coin") for seed in range(60)]
    (kind,) = {next(iter(each.coins)) for each in found}
    assert {each.pairs[0]["verdict"] for each in found} == {kind} and kind in ("tie", "order-dependent")
    assert 15 < sum(sides(each) == {("a", "b")} for each in found) < 45


def test_a_chat_prompt_has_chat_answers_and_a_text_prompt_text():
    chat = [{"role": "user", "content": "p"}]
    answers = [[Answer("a", False, "m"), Answer("b", False, "m")]] * 2
    found = pair_answers(Ranked({("a", "b")}), [chat, "p"], answers, build(), 0)
    assert found.pairs[0]["chosen"] == [{"role": "assistant", "content": "a"}] and found.pairs[1]["chosen"] == "a"


def test_tools_stand_in_a_column_of_the_pairs_and_before_the_judge():
    tools = [{"name": "weather"}]
    asked, seen = [{"role": "user", "content": "Rain?", "tools": tools}], []
    judge = Ranked({("a", "b")})
    judge.decide = lambda shown: seen.extend(shown) or Ranked.decide(judge, shown)
    (pair,) = pair_answers(judge, [asked], [[Answer("a", False, "m"), Answer("b", False, "m")]], build(), 0).pairs
    assert pair["tools"] == tools and pair["prompt"] == [{"role": "user", "content": "Rain?"}]
    assert fence(seen[0].parts, "x").startswith('<<<message x>>>\ntools: {"name": "weather"}\n\nuser: Rain?\n')


# --- prompts -----------------------------------------------------------------------------------------------------


def data(**options):
    return Data(**{**compose_tool([]).data, **options})


def test_each_prompt_is_taken_once_and_every_row_accounted_for(tmp_path):
    rows = [{"prompt": text} for text in ("one", "two", "one", "three", " ", "four")] + [{"question": "x"}]
    rows += [{"prompt": [{"role": "assistant", "content": "Hi"}]}, {"prompt": [{"role": "usr", "content": "x"}]}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"4 malformed rows:\n  .*prompts\.jsonl:5: prompt is empty"):
        read_prompts(str(path), data(), None)
    prompts, left_out = read_prompts(str(path), data(on_bad_row="drop"), 3)
    assert prompts == ["one", "two", "three"]
    assert len(rows) == len(prompts) + sum(left_out.values())
    assert left_out["repeated"] == left_out["beyond build.limit"] == 1


def test_the_prompts_of_a_mixture_and_of_another_column(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": name}) + "\n")
    mixture = [{"path": str(tmp_path / f"{name}.jsonl")} for name in "ab"]
    assert read_prompts(None, data(train=mixture, columns={"prompt": "question"}), None)[0] == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["build.pairs=best"], "build.pairs: .*'best_worst' or 'all'"),
        (
            ["build.answers=[{path: x, drawz: 2}]"],
            r"unknown key build\.answers\.0\.drawz; did you mean build\.answers\.draws",
        ),
        (["judge=llm", "judge.model=m"], r"judge\.base_url is missing"),
        (["judge=llm", "judge.model=m", "judge.base_url=localhost:1"], r"judge\.base_url: .*got 'localhost:1'"),
        (["build.answers=[]"], "build.answers: .*at least 1 item"),
        (["out=/dev/null/x", "build.prompts=nowhere.jsonl"], r"build\.prompts=nowhere\.jsonl: no such file or folder"),
        (["data=jsonl", "data.train=x.jsonl"], r"data\.gold is null, and mode=build needs somebody to compare"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(words, said):
    with pytest.raises((ConfigError, DataError), match=said):
        build_pairs(compose_tool(words))


# --- whole ways --------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def served_model(tmp_path):
    """The address of `transformers serve` with the embedded model."""
    pytest.importorskip("fastapi", reason="needs the extra serve")
    port = free_port()
    words = ["serve", str(toy.MODEL), "--port", str(port), "--host", "127.0.0.1"]
    starter = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", starter, *words], stdout=log, stderr=log)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process, tmp_path / "serve.log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def wait_until_healthy(address, process, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.mark.slow
@pytest.mark.fault("SIGKILL of a build that asks a real server", promise="P4")
def test_a_build_from_transformers_serve_is_killed_resumed_and_trained_on(served_model, tmp_path, command):
    out = tmp_path / "out"
    source = server_source(served_model, model=toy.MODEL)
    words = ["mode=build", "build.limit=60", f"out={out}", source]
    process = subprocess.Popen([sys.executable, "-m", "dpo_kit", "data", *words])
    journal = out / "answers.jsonl"
    while process.poll() is None and not (journal.exists() and len(journal.read_bytes().splitlines()) >= 60):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = journal.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    done = command("data", *words)
    assert done.returncode == 0, done.stderr
    assert journal.read_bytes().startswith(before) and 60 <= len(before.splitlines()) < 120
    report = json.loads((out / "build_report.json").read_text())
    keys = Counter(row["key"] for row in read_jsonl(journal))
    assert len(keys) == 120 == keys.total() and accounted(report) and report["pairs"] > 30
    trained = command(
        "data=toy", f"data.train={out / 'pairs.jsonl'}", "trl.max_steps=2", "callbacks=none", "tracking=none"
    )
    assert trained.returncode == 0, trained.stderr
    judge = ["judge=llm", f"judge.base_url={served_model}", f"judge.model={toy.MODEL}", "judge.controls=2"]
    words = ["mode=build", "build.limit=4", f"out={tmp_path / 'judged'}", *judge]
    judged = command("data", *words, "judge.max_tokens=32")
    assert judged.returncode == 1 and "keeps to no form of verdict" in judged.stderr, judged.stderr  # it is no judge
    assert not (tmp_path / "judged" / "pairs.jsonl").exists()


@pytest.mark.slow
@pytest.mark.fault("SIGKILL of a build that samples here", promise="P4")
def test_a_build_from_the_embedded_model_is_killed_and_resumed_to_the_same_bytes(tmp_path, command):
    words = ["mode=build", "build.limit=400"]
    assert command("data", *words, f"out={tmp_path / 'whole'}").returncode == 0
    out = tmp_path / "out"
    for kill in range(2):
        process = subprocess.Popen([sys.executable, "-m", "dpo_kit", "data", *words, f"out={out}"], env=os.environ)
        wanted = 200 * (kill + 1) + random.randrange(50)
        journal = out / "answers.jsonl"
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= wanted):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = command("data", *words, f"out={out}")
    assert done.returncode == 0, done.stderr
    for name in ("pairs.jsonl", "comparisons.jsonl"):
        assert digest(out / name) == digest(tmp_path / "whole" / name)
    assert sorted(r["key"] for r in read_jsonl(out / "answers.jsonl")) == sorted(
        r["key"] for r in read_jsonl(tmp_path / "whole" / "answers.jsonl")
    )


@pytest.mark.slow
def test_the_embedded_prompts_model_and_judge_need_no_argument(tmp_path, command):
    done = command("data", "mode=build")
    assert done.returncode == 0, done.stderr
    (out,) = tmp_path.glob("outputs/build-*")
    report = json.loads((out / "build_report.json").read_text())
    assert report["pairs"] > 2000 and accounted(report)
    assert report["judge"]["order_agreement"] == 1
