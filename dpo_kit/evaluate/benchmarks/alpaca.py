"""AlpacaEval 2: outputs in its format, the command that has them annotated, its annotations read back.

The package (`alpaca-eval`, unchanged since 2024) is no dependency: it runs in an environment of its own, since its
weighted annotator needs a judge with log-probabilities and a key. Rates here are shares, 0 to 1; its own are percent.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dpo_kit.data.read import read_whole
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.options import Alpaca
from dpo_kit.evaluate.part import Found, Line, Note, Part, Speaker, asked, line, speakers_of
from dpo_kit.run.files import write_json
from dpo_kit.run.intervals import Z95
from dpo_kit.run.statistics import paired_bootstrap

PROMPTS = 805  # of AlpacaEval: its length control knows the difficulty of these only
KEYS = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator", "preference")


class AlpacaEval(Part):
    """AlpacaEval 2; waiting until the policy's outputs are annotated."""

    def check(self, job: Job) -> None:
        read_instructions(asked(job.options.alpaca_eval))

    def measure(self, job: Job) -> Found:
        options = asked(job.options.alpaca_eval)
        with speakers_of(job, options.max_new_tokens) as speakers:
            return run_alpaca(*speakers, options, job.folder, job.shared)

    def headline(self, found: Found) -> Found:
        if not (result := found["policy"]):
            return {}
        rates = {"alpaca_eval_win_rate": result, "alpaca_eval_win_rate_length_controlled": result["length_controlled"]}
        ends = {"": "win_rate", "_low": "low", "_high": "high"}
        return {f"{name}{end}": rate.get(key) for name, rate in rates.items() for end, key in ends.items()}

    def tell(self, found: Found) -> Iterator[Line | Note]:
        if result := found["policy"]:
            yield line(f"AlpacaEval against {result['baseline']}, {result['n']:,} prompts", result, "win_rate")
            if result["length_controlled"]["win_rate"] is not None:
                yield line("… length-controlled", result["length_controlled"], "win_rate")
            if test := found["difference"]:
                yield line("… less the reference's", test, "value", "+.3f")
        for name, model in found["models"].items():
            if not model["result"]:
                yield Note(f"AlpacaEval: the answers of {name} wait for their annotation: {model['command']}")


def run_alpaca(policy: Speaker, reference: Speaker, options: Alpaca, folder: Path, shared: Path) -> Found:
    """Outputs of both for AlpacaEval, and its verdict on them once its command has run (which only the user does).

    {status: done | waiting, policy: its result, prompts, models: {name: {outputs, command, result}}, difference}:
    `result` is as `read_annotations` gives it (None before), `difference` policy − reference against the same baseline,
    by instruction (None before both are annotated). The policy's files lie in `folder`/alpaca_eval, the reference's in
    `shared`/alpaca_eval, so that a sweep pays for those once. ConfigError or DataError where instructions or
    annotations cannot be had.
    """
    instructions = read_instructions(options)
    prompts = [row["instruction"] for row in instructions]
    models, points = {}, []
    for speaker, place in ((policy, folder), (reference, shared)):
        outputs = place / "alpaca_eval" / speaker.name / "model_outputs.json"
        rows = [
            {"instruction": row["instruction"], "output": answer.strip(), "generator": speaker.name,
             "dataset": row.get("dataset", "own")}
            for row, answer in zip(instructions, speaker.answer(prompts, options.temperature), strict=True)
        ]  # fmt: skip
        write_json(outputs, rows)
        annotations = annotations_file(outputs.parent, options)
        result = read_annotations(annotations, rows) if annotations.exists() else None
        points.append(result.pop("points") if result else {})
        command = alpaca_command(outputs, options, len(prompts))
        models[speaker.name] = {"outputs": str(outputs), "command": command, "result": result}
    ours, difference = models[policy.name]["result"], paired_bootstrap(points[0], points[1])
    return {"status": "done" if ours else "waiting", "policy": ours, "prompts": len(prompts), "models": models,
            "difference": difference and asdict(difference)}  # fmt: skip


def read_instructions(options: Alpaca) -> list[dict[str, Any]]:
    """AlpacaEval's prompts, rows with at least `instruction`: from `options.instructions`, else from the hub."""
    path = options.instructions
    if path is None:
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval.json", repo_type="dataset")
        except OSError as error:
            raise ConfigError(
                "AlpacaEval's prompts are not on this machine and cannot be fetched: fetch alpaca_eval.json of the "
                "data set tatsu-lab/alpaca_eval where there is a network, and name it: alpaca_eval.instructions=FILE "
                f"({str(error).splitlines()[0]})"
            ) from error
    rows = read_whole("alpaca_eval.instructions", path)
    if not rows:
        raise DataError(f"alpaca_eval.instructions={path} has no rows, with the key instruction each")
    for row in rows:
        if not isinstance(row.values.get("instruction"), str):
            raise DataError(f"alpaca_eval.instructions: {row.place} has no text under the key instruction")
    return [row.values for row in rows[: options.limit]]


def alpaca_command(outputs: Path, options: Alpaca, prompts: int) -> str:
    """The shell command that has `outputs` annotated by AlpacaEval's package, against its own baseline. Without its 805
    prompts the length control has nothing to stand on and is left out. The package's own leaderboard is not written to,
    and a name that is in it is annotated again.
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


def read_annotations(path: Path, outputs: Sequence[Mapping[str, Any]]) -> Found:
    """Win rate with n and 95 % interval (bootstrap by instruction) of an annotations.json on `outputs`.

    {baseline, annotator, n, unannotated, wins, draws, losses, win_rate, low, high, better, length_controlled, points}.
    `length_controlled` comes from leaderboard.csv beside it; where that has none, it says why. `points` are those of
    each output by its place: 1 for the model, 0 for the baseline, ½ for a draw. DataError where the annotations are of
    other outputs or not in the package's form.
    """
    rows = read_whole("annotations", str(path))
    places = {(row["instruction"], row["output"]): str(number) for number, row in enumerate(outputs)}
    points: dict[str, float] = {}
    for row in rows:
        if missing := [key for key in KEYS if key not in row.values]:
            raise DataError(f"{row.place} lacks {', '.join(missing)}: was it written by alpaca_eval 0.6?")
        output = places.get((row.values["instruction"], row.values["output_2"]))
        if output is None:
            raise DataError(
                f"{row.place} is about an output that is not in model_outputs.json: the annotations are of another "
                "run; delete them, and run the command again"
            )
        preference = row.values["preference"]  # 2 the model, 1 the baseline, 1.5 or 0 a draw
        if preference is None:
            continue
        if not isinstance(preference, int | float) or not (preference == 0 or 1 <= preference <= 2):
            raise DataError(f"{row.place} has preference {preference!r}; it is 1 to 2, or 0 for a draw")
        points[output] = float(preference) - 1 if preference else 0.5
    found = paired_bootstrap(points, dict.fromkeys(points, 0.5))
    if found is None:
        raise DataError(f"{path} has {len(points)} preferences: an interval needs two at least")
    first = rows[0].values
    return {
        "baseline": first["generator_1"], "annotator": first["annotator"],
        "n": found.count, "unannotated": len(outputs) - found.count,
        "wins": sum(value > 0.5 for value in points.values()),
        "draws": sum(value == 0.5 for value in points.values()),
        "losses": sum(value < 0.5 for value in points.values()),
        "win_rate": found.value + 0.5, "low": found.low + 0.5, "high": found.high + 0.5, "better": found.low > 0,
        "length_controlled": _length_controlled(path.with_name("leaderboard.csv"), first["generator_2"], points),
        "points": points,
    }  # fmt: skip


def _length_controlled(leaderboard: Path, name: str, points: Mapping[str, float]) -> Found:
    """The package's own length-controlled rate, with an interval that the package does not give. Its lc_standard_error
    is the spread of its model's predictions over instructions, no sampling error. The interval takes the raw rate's
    standard error over to the logit of this rate; what the fit of the length adds is left out.
    """
    rows = read_whole("leaderboard", str(leaderboard)) if leaderboard.exists() else []
    row = next((row.values for row in rows if row.values.get("") == name), None)
    text = (row or {}).get("length_controlled_winrate")
    if not text:
        reason = f"{leaderboard} has no length_controlled_winrate of {name}" if row else f"no {name} in {leaderboard}"
        return {"win_rate": None, "reason": f"{reason}: it exists for AlpacaEval's own {PROMPTS} prompts only"}
    rate, count, raw = float(text) / 100, len(points), fmean(points.values())
    if not (0 < raw < 1 and 0 < rate < 1):
        return {"win_rate": rate, "n": count, "low": None, "high": None, "interval": "none: a rate at its end has none"}
    standard_error = stdev(points.values()) / math.sqrt(count)
    logit, half = math.log(rate / (1 - rate)), Z95 * standard_error / (raw * (1 - raw))
    low, high = (1 / (1 + math.exp(-(logit + sign * half))) for sign in (-1, 1))
    return {"win_rate": rate, "n": count, "low": low, "high": high, "interval": "raw standard error, logit scale"}
