"""AlpacaEval 2: the files that its package reads and writes, and rates worked out by hand."""

import csv
import json
import math
import random
import shlex
from pathlib import Path

import pytest

from dpo_kit.errors import ConfigError, DataError
from dpo_kit.evaluate.benchmarks.alpaca import (
    alpaca_command,
    annotations_file,
    read_annotations,
    read_instructions,
    run_alpaca,
)
from dpo_kit.evaluate.options import Alpaca
from dpo_kit.evaluate.part import Speaker

ECHO = Speaker("policy", lambda prompts, temperature: [f" Answer to {prompt} " for prompt in prompts])
PLAIN = Speaker("reference", lambda prompts, temperature: ["I do not know." for _ in prompts])


def instructions(folder: Path, count: int) -> Alpaca:
    rows = [{"instruction": f"Question {index}?", "output": "x", "dataset": "helpful_base"} for index in range(count)]
    (folder / "alpaca_eval.json").write_text(json.dumps(rows))
    return Alpaca(instructions=str(folder / "alpaca_eval.json"))


def annotate(folder: Path, options: Alpaca, preferences: list, name: str = "policy", lc: float | None = None) -> Path:
    """What the package leaves behind: its keys, its order, a leaderboard in which other models stand too."""
    outputs = json.loads((folder / "alpaca_eval" / name / "model_outputs.json").read_text())
    rows = [
        {
            "instruction": row["instruction"],
            "output_1": "the baseline's",
            "generator_1": "gpt4_1106_preview",
            "dataset": row["dataset"],
            "output_2": row["output"],
            "generator_2": name,
            "annotator": "weighted_alpaca_eval_gpt4_turbo",
            "preference": preference,
            "raw_completion": {},
        }
        for row, preference in zip(outputs, preferences, strict=True)
    ]
    path = annotations_file(folder / "alpaca_eval" / name, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(random.Random(0).sample(rows, len(rows)), indent=2))
    with path.with_name("leaderboard.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["", "win_rate", "standard_error", "length_controlled_winrate", "lc_standard_error"])
        table.writerow(["gpt4_turbo", 50.0, 0.0, 50.0, 0.0])
        table.writerow([name, 40.0, 1.0, lc if lc is not None else "", 0.1])
    return path


def test_outputs_have_the_package_s_form_and_the_command_names_them(tmp_path):
    options = instructions(tmp_path, 3)
    found = run_alpaca(ECHO, PLAIN, options, tmp_path / "a folder", tmp_path / "a folder")
    shared = run_alpaca(ECHO, PLAIN, options, tmp_path / "run", tmp_path / "sweep")["models"]
    assert [Path(shared[each.name]["outputs"]).parts[-4] for each in (ECHO, PLAIN)] == ["run", "sweep"]
    own = found["models"]["policy"]
    rows = json.loads(Path(own["outputs"]).read_text())
    assert rows[1] == {
        "instruction": "Question 1?",
        "output": "Answer to Question 1?",
        "generator": "policy",
        "dataset": "helpful_base",
    }
    words = shlex.split(own["command"])
    assert words[0] == "alpaca_eval" and words[words.index("--model_outputs") + 1] == own["outputs"]
    assert words[words.index("--output_path") + 1] == str(Path(own["outputs"]).parent)
    assert words[words.index("--fn_metric") + 1] == "get_winrate"  # three prompts: nothing to control the length with
    assert own["result"] is None and found["difference"] is None
    assert "--fn_metric" not in alpaca_command(Path("x.json"), options, 805)


def test_annotations_are_read_back_as_rates(tmp_path):
    """Preferences 2, 1.9, 1.5, 0 (a draw), 1.2, 1, and one without: points 1, .9, .5, .5, .2, 0: mean 3.1/6."""
    options = instructions(tmp_path, 7)
    run_alpaca(ECHO, PLAIN, options, tmp_path, tmp_path)
    path = annotate(tmp_path, options, [2, 1.9, 1.5, 0, 1.2, 1, None])
    found = run_alpaca(ECHO, PLAIN, options, tmp_path, tmp_path)["models"]["policy"]["result"]
    assert found["win_rate"] == pytest.approx(3.1 / 6)
    assert (found["n"], found["unannotated"]) == (6, 1)
    assert (found["wins"], found["draws"], found["losses"]) == (2, 2, 2)
    assert 0.15 < found["low"] < found["win_rate"] < found["high"] < 0.85 and not found["better"]
    assert found["baseline"] == "gpt4_1106_preview"
    assert found["length_controlled"]["win_rate"] is None
    assert "no length_controlled_winrate of policy" in found["length_controlled"]["reason"]
    path.with_name("leaderboard.csv").unlink()
    found = run_alpaca(ECHO, PLAIN, options, tmp_path, tmp_path)["models"]["policy"]["result"]
    assert "no policy in" in found["length_controlled"]["reason"]


def test_the_length_controlled_rate_is_the_package_s_with_an_interval_on_the_logit_scale(tmp_path):
    """100 annotations of which 40 are won: standard error √(.24/99) = .04924; logit(.35) ± 1.96·.04924/.24."""
    options = instructions(tmp_path, 100)
    run_alpaca(ECHO, PLAIN, options, tmp_path, tmp_path)
    annotate(tmp_path, options, [2] * 40 + [1] * 60, lc=35.0)
    found = run_alpaca(ECHO, PLAIN, options, tmp_path, tmp_path)["models"]["policy"]["result"]["length_controlled"]
    centre, half = math.log(0.35 / 0.65), 1.96 * math.sqrt(0.24 / 99) / 0.24
    ends = [1 / (1 + math.exp(-(centre + sign * half))) for sign in (-1, 1)]
    assert (found["win_rate"], found["n"]) == (0.35, 100)
    assert [found["low"], found["high"]] == pytest.approx(ends, abs=1e-4)


def test_both_against_one_baseline_differ_by_instruction(tmp_path):
    options = instructions(tmp_path, 40)
    run_alpaca(ECHO, PLAIN, options, tmp_path, tmp_path)
    annotate(tmp_path, options, [2] * 30 + [1] * 10)
    annotate(tmp_path, options, [2] * 10 + [1] * 30, "reference")
    found = run_alpaca(ECHO, PLAIN, options, tmp_path, tmp_path)
    assert found["difference"]["value"] == 0.5 and found["difference"]["count"] == 40
    assert 0.3 < found["difference"]["low"] < 0.5 < found["difference"]["high"] < 0.7


def test_annotations_of_other_outputs_or_of_another_form_are_refused(tmp_path):
    options = instructions(tmp_path, 3)
    run_alpaca(ECHO, PLAIN, options, tmp_path, tmp_path)
    path = annotate(tmp_path, options, [2, 2, 1])
    outputs = json.loads((tmp_path / "alpaca_eval/policy/model_outputs.json").read_text())
    good = json.loads(path.read_text())
    changed = Speaker("policy", lambda prompts, temperature: ["another answer" for _ in prompts])
    with pytest.raises(DataError, match="annotations are of another run; delete them"):
        run_alpaca(changed, PLAIN, options, tmp_path, tmp_path)
    for faulty, reason in (
        ([good[0] | {"preference": 3}, *good[1:]], "has preference 3; it is 1 to 2"),
        ([{key: value for key, value in row.items() if key != "output_2"} for row in good], "row 0 lacks output_2"),
        ({}, "must hold one JSON list of rows"),
        ([row | {"preference": None} for row in good], "has 0 preferences"),
    ):
        path.write_text(json.dumps(faulty))
        with pytest.raises(DataError, match=reason):
            read_annotations(path, outputs)
    path.write_text("[")
    with pytest.raises(DataError, match=r"annotations\.json:1: not JSON"):
        read_annotations(path, outputs)


def test_instructions_that_cannot_be_had_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"fetch alpaca_eval.json of the data set .*instructions=FILE"):
        read_instructions(Alpaca())
    file = tmp_path / "own.json"
    for text, reason in (("[]", "has no rows"), ('[{"prompt": "x"}]', "row 0 has no text under"), ("{", "not JSON")):
        file.write_text(text)
        with pytest.raises(DataError, match=reason):
            read_instructions(Alpaca(instructions=str(file)))
