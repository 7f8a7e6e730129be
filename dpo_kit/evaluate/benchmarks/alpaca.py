"""AlpacaEval 2: outputs in its format, the command that has them annotated, its annotations read back.

The package (`alpaca-eval`, unchanged since 2024) is no dependency: it runs in an environment of its own, since its
weighted annotator needs a judge with log-probabilities and a key. Rates here are shares, 0 to 1; its own are percent.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_kit.errors import ConfigError, DataError
from dpo_kit.evaluate.benchmark_options import Alpaca
from dpo_kit.evaluate.benchmarks.dialogue import Speaker, check_names
from dpo_kit.run.files import write_json
from dpo_kit.run.statistics import Z95, paired_bootstrap

PROMPTS = 805  # of AlpacaEval: its length control knows the difficulty of these only
KEYS = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator", "preference")


def run_alpaca(
    policy: Speaker, reference: Speaker | None, options: Alpaca, folder: Path, shared: Path | None = None
) -> dict[str, Any]:
    """Outputs of both for AlpacaEval, and its verdict on them once its command has run (which only the user does).

    {models: {name: {outputs, command, result}}, difference}: `result` is as `read_annotations` gives it (None before),
    `difference` policy − reference against the same baseline, by instruction. The policy's files lie in
    `folder`/alpaca_eval, the reference's in `shared`/alpaca_eval, so that a sweep pays for those once.
    ConfigError or DataError where instructions or annotations cannot be had.
    """
    speakers = [policy, reference] if reference else [policy]
    check_names(*(speaker.name for speaker in speakers))
    asked = read_instructions(options)
    models, points = {}, []
    for speaker in speakers:
        own = (folder if speaker is policy else shared or folder) / "alpaca_eval" / speaker.name
        outputs = own / "model_outputs.json"
        answers = speaker.answer([row["instruction"] for row in asked], options.temperature)
        rows = write_outputs(asked, answers, speaker.name, outputs)
        annotations = annotations_file(own, options)
        found = read_annotations(annotations, rows) if annotations.exists() else None
        points.append(found.pop("points") if found else None)
        models[speaker.name] = {
            "outputs": str(outputs),
            "command": alpaca_command(outputs, options, len(asked)),
            "result": found,
        }
    return {
        "prompts": len(asked),
        "models": models,
        "difference": _difference(points[0], points[-1] if reference else None),
    }


def read_instructions(options: Alpaca) -> list[dict[str, Any]]:
    """AlpacaEval's prompts, rows with at least `instruction`: from `options.instructions`, else from the hub."""
    path = Path(options.instructions).expanduser() if options.instructions else _fetch()
    rows = _read_list(path, f"instructions={path}", "a list of rows with the key instruction, as alpaca_eval.json is")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
            raise DataError(f"instructions={path}: row {number} has no text under the key instruction")
    return rows[: options.limit]


def _read_list(path: Path, name: str, meant: str) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{name} cannot be read as JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{name} must be {meant}")
    return rows


def _fetch() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval.json", repo_type="dataset"))
    except OSError as error:
        raise ConfigError(
            "AlpacaEval's prompts are not on this machine and cannot be fetched: fetch alpaca_eval.json of the data "
            "set tatsu-lab/alpaca_eval where there is a network, and name it: instructions=FILE "
            f"({str(error).splitlines()[0]})"
        ) from error


def write_outputs(
    asked: Sequence[Mapping[str, Any]], answers: Sequence[str], generator: str, path: Path
) -> list[dict[str, Any]]:
    """The answers in AlpacaEval's format, a JSON list of {instruction, output, generator, dataset}."""
    rows = [
        {
            "instruction": row["instruction"],
            "output": answer.strip(),
            "generator": generator,
            "dataset": row.get("dataset", "own"),
        }
        for row, answer in zip(asked, answers, strict=True)
    ]
    write_json(path, rows)
    return rows


def alpaca_command(outputs: Path, options: Alpaca, prompts: int) -> str:
    """The shell command that has `outputs` annotated by AlpacaEval's package, against its own baseline.

    Without its 805 prompts the length control has nothing to stand on and is left out. The package's own leaderboard
    is not written to, and a name that is in it is annotated again.
    """
    words = ["alpaca_eval", "--model_outputs", str(outputs), "--annotators_config", options.annotators_config]
    words += ["--output_path", str(outputs.parent), "--is_overwrite_leaderboard", "True"]
    words += ["--is_cache_leaderboard", "False"]
    if prompts != PROMPTS:
        words += ["--fn_metric", "get_winrate", "--sort_by", "win_rate"]
    return shlex.join(words)


def annotations_file(folder: Path, options: Alpaca) -> Path:
    """Where the package leaves its annotations of the outputs in `folder`."""
    named = "/" not in options.annotators_config
    return folder / (options.annotators_config if named else "") / "annotations.json"


# --- reading back ------------------------------------------------------------------------------------------------


def read_annotations(path: Path, outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Win rate with n and 95 % interval (bootstrap by instruction) of an annotations.json on `outputs`.

    {baseline, annotator, n, unannotated, wins, draws, losses, win_rate, low, high, better, length_controlled, points}.
    `length_controlled` comes from leaderboard.csv beside it; where that has none, it says why. `points` are those of
    each output by its place. DataError where the annotations are of other outputs or not in the package's form.
    """
    rows = _read_rows(path)
    places = {(row["instruction"], row["output"]): str(number) for number, row in enumerate(outputs)}
    points: dict[str, float] = {}
    for number, row in enumerate(rows, start=1):
        place = places.get((row["instruction"], row["output_2"]))
        if place is None:
            raise DataError(
                f"{path}: row {number} is about an output that is not in model_outputs.json: the annotations are of "
                "another run; delete them, and run the command again"
            )
        if row["preference"] is not None:
            points[place] = _points(path, number, row["preference"])
    found = paired_bootstrap(points, dict.fromkeys(points, 0.5))
    if found is None:
        raise DataError(f"{path} has {len(points)} preferences: an interval needs two at least")
    rate = found.value + 0.5
    return {
        "baseline": rows[0]["generator_1"],
        "annotator": rows[0]["annotator"],
        "n": found.count,
        "unannotated": len(outputs) - found.count,
        "wins": sum(value > 0.5 for value in points.values()),
        "draws": sum(value == 0.5 for value in points.values()),
        "losses": sum(value < 0.5 for value in points.values()),
        "win_rate": rate,
        "low": found.low + 0.5,
        "high": found.high + 0.5,
        "better": found.low > 0,
        "length_controlled": _length_controlled(path.with_name("leaderboard.csv"), rows[0]["generator_2"], points),
        "points": points,
    }


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = _read_list(path, str(path), "a list of annotations, as alpaca_eval writes it")
    for number, row in enumerate(rows, start=1):
        if missing := [key for key in KEYS if not isinstance(row, dict) or key not in row]:
            raise DataError(
                f"{path}: annotation {number} lacks {', '.join(missing)}: was it written by alpaca_eval 0.6?"
            )
    return rows


def _points(path: Path, number: int, preference: Any) -> float:
    """1 for the model, 0 for the baseline, ½ for a draw: the package writes 2, 1, and 1.5 or 0."""
    if preference == 0:
        return 0.5
    if not isinstance(preference, int | float) or not 1 <= preference <= 2:
        raise DataError(f"{path}: annotation {number} has preference {preference!r}; it is 1 to 2, or 0 for a draw")
    return float(preference) - 1


def _length_controlled(leaderboard: Path, name: str, points: Mapping[str, float]) -> dict[str, Any]:
    """The package's own length-controlled rate, with an interval that the package does not give.

    Its lc_standard_error is the spread of its model's predictions over instructions, no sampling error. The interval
    takes the raw rate's standard error over to the logit of this rate; what the fit of the length adds is left out.
    """
    row = _leaderboard_row(leaderboard, name)
    text = (row or {}).get("length_controlled_winrate")
    if not text:
        reason = f"{leaderboard} has no length_controlled_winrate of {name}" if row else f"no {name} in {leaderboard}"
        return {"win_rate": None, "reason": f"{reason}: it exists for AlpacaEval's own {PROMPTS} prompts only"}
    rate, count = float(text) / 100, len(points)
    raw = sum(points.values()) / count
    spread = math.sqrt(sum((value - raw) ** 2 for value in points.values()) / (count - 1) / count)
    if not (0 < raw < 1 and 0 < rate < 1):
        return {"win_rate": rate, "n": count, "low": None, "high": None, "interval": "none: a rate at its end has none"}
    logit, half = math.log(rate / (1 - rate)), Z95 * spread / (raw * (1 - raw))
    low, high = (1 / (1 + math.exp(-(logit + sign * half))) for sign in (-1, 1))
    return {"win_rate": rate, "n": count, "low": low, "high": high, "interval": "raw standard error, logit scale"}


def _leaderboard_row(path: Path, name: str) -> dict[str, str] | None:
    if not path.exists():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        return next((row for row in csv.DictReader(file) if row.get("") == name), None)


def _difference(ours: Mapping[str, float] | None, theirs: Mapping[str, float] | None) -> dict[str, Any] | None:
    """Policy − reference against the same baseline, by instruction; None where one of them is not annotated."""
    found = paired_bootstrap(ours, theirs) if ours and theirs else None
    return asdict(found) if found else None
