"""The runs of a sweep as their directories tell them: settings, state, final values, answers and pairs. No torch.

A sweep directory holds one run per subfolder and, where our launcher wrote it, sweep.json with the state of each job.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dpo_kit.config.compose import own_folders
from dpo_kit.errors import DataError, did_you_mean
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json
from dpo_kit.run.history import read_metrics, series
from dpo_kit.run.redact import redact_argv

log = logging.getLogger(__name__)
DONE = "done"
UNKNOWN = "running or killed"  # what no result.json means where no launcher says more
SELDOM_SWEPT = ("beta", "seed", "method", "trl.beta", "trl.seed", "trl.data_seed")  # shown anyway, or follow from these


@dataclass(frozen=True)
class RunRecord:
    """One run of a sweep. `path` is relative to the sweep directory; `result` is empty where the run has not ended.

    `job` is the launcher's entry for it (sweep.json), empty where there is none; `fault` says which of its files
    cannot be read.
    """

    root: Path
    path: str
    manifest: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)
    judged: Mapping[str, Any] = field(default_factory=dict)
    test: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.manifest.get("config") or {}

    @property
    def method(self) -> str | None:
        return self.result.get("method") or (self.config.get("method") or {}).get("name") or self.job.get("method")

    @property
    def beta(self) -> float | None:
        return _first_number(self.result.get("beta"), self.config.get("beta"), self.job.get("beta"))

    @property
    def seed(self) -> float | None:
        return _first_number(self.result.get("seed"), self.config.get("seed"), self.job.get("seed"))

    @property
    def tuning(self) -> str | None:
        return self.result.get("tuning") or (self.config.get("model") or {}).get("tuning")

    @property
    def status(self) -> str:
        """A written result that says done is final; else what the launcher says, else what result.json says."""
        ended = self.result.get("status")
        return DONE if ended == DONE else str(self.job.get("state") or ended or UNKNOWN)

    @property
    def finished(self) -> bool:
        return self.result.get("status") == DONE

    @property
    def error(self) -> str | None:
        return None if self.finished else self.fault or self.result.get("error") or self.job.get("error")

    @property
    def seconds(self) -> float | None:
        """Wall-clock of the whole job where the launcher measured it, else of training."""
        return _first_number(self.job.get("seconds"), (self.result.get("seconds") or {}).get("train"))

    def final(self, key: str) -> float | None:
        """A measured value at the end, None where it was not measured or the run has not ended well."""
        return number((self.result.get("final") or {}).get(key)) if self.finished else None

    def start(self, key: str) -> float | None:
        """A measured value of the step-0 model, None where it was not measured."""
        return number((self.result.get("start") or {}).get(key))

    @property
    def start_model(self) -> tuple[str, ...]:
        """What tells step-0 models apart: weights (their hash, else path and revision), and an explicit reference."""
        model = self.manifest.get("model") or {}
        weights = model.get("sha256") or f"{model.get('path')}@{model.get('revision')}"
        return (str(weights), str((self.config.get("model") or {}).get("reference") or ""))

    @property
    def start_name(self) -> str:
        """The step-0 model in words that fit a picture."""
        name = Path(str((self.manifest.get("model") or {}).get("path") or "unknown model")).name
        reference = (self.config.get("model") or {}).get("reference")
        return f"{name} (reference {Path(reference).name})" if reference else name

    @cached_property
    def overrides(self) -> dict[str, str] | None:
        """What was typed for this job, by key; None where it is not recorded. Not from Hydra's own record, which every
        start writes anew, also one that is refused.
        """
        typed = self.job.get("overrides")
        if typed is None and (command := self.manifest.get("command")):
            typed = [word for word in shlex.split(command) if "=" in word]
        if typed is None:
            return None
        pairs = (str(each).lstrip("+~").partition("=") for each in typed)
        return {key: value for key, _, value in pairs if not key.startswith("hydra")}

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; none where the file is broken, which the log says."""
        return _rows(RunDirectory(self.root).metrics)

    def series(self, key: str) -> dict[int, float]:
        return series(self.history, key)

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """The rows of samples.jsonl that name their prompt, as a test by prompt needs it."""
        return [row for row in _rows(RunDirectory(self.root).samples) if row.get("prompt_id") is not None]

    def gold_by_prompt(self, *, at_start: bool = False) -> dict[str, float]:
        """Gold reward of the answer to each prompt at the last scoring (or at step 0); {} where not recorded."""
        rows = [row for row in self.answers if number(row.get("gold_reward")) is not None]
        step = 0 if at_start else max((row["step"] for row in rows), default=0)
        if not at_start and step == 0:
            return {}
        return {row["prompt_id"]: row["gold_reward"] for row in rows if row["step"] == step}

    @cached_property
    def pairs(self) -> dict[str, tuple[str, float]]:
        """{pair_id: (prompt_id, margin in nats)} at the last scoring of the probe; {} for rows that are no pairs."""
        rows = _rows(RunDirectory(self.root).probe)
        last = max((row["step"] for row in rows), default=None)
        sides = ("logratio_chosen_nats", "logratio_rejected_nats")
        whole = [row for row in rows if row["step"] == last and None not in (row.get(sides[0]), row.get(sides[1]))]
        return {row["pair_id"]: (row["prompt_id"], row[sides[0]] - row[sides[1]]) for row in whole}

    @cached_property
    def points_by_prompt(self) -> dict[str, float]:
        """The mean points of the answers to each prompt in evaluation/verdicts.jsonl; {} where nothing was judged."""
        points: dict[str, list[float]] = {}
        for row in _rows(RunDirectory(self.root).evaluation / "verdicts.jsonl"):
            if number(row.get("points")) is not None:
                points.setdefault(row["prompt_id"], []).append(row["points"])
        return {prompt: sum(values) / len(values) for prompt, values in points.items()}

    @property
    def judged_by(self) -> tuple[Any, ...]:
        """What win rates must share to be compared: the judge, and whose answers stood against the policy's."""
        judge = {key: value for key, value in (self.judged.get("judge") or {}).items() if key != "controls_failed"}
        return (json.dumps(judge, sort_keys=True), self.judged.get("opponent"))

    @property
    def kl_reverse_key(self) -> str:
        """Rao-Blackwell where it was affordable, else k1."""
        best, fallback = "probe/kl_reverse_rb_nats", "probe/kl_reverse_k1_nats"
        return best if self.final(best) is not None or self.series(best) else fallback

    @property
    def kl_reverse(self) -> float | None:
        return self.final(self.kl_reverse_key)

    @property
    def tokens_per_answer(self) -> float | None:
        """Mean length of the last fresh answers, EOS in; from KL per answer over KL per token where not recorded."""
        last = max((row["step"] for row in self.answers), default=None)
        lengths = [row["tokens"] for row in self.answers if row["step"] == last and number(row.get("tokens"))]
        if lengths and self.finished:
            return sum(lengths) / len(lengths)
        each = self.final(f"{self.kl_reverse_key}_per_token")
        return self.kl_reverse / each if each and self.kl_reverse is not None else None


def number(value: Any) -> float | None:
    """`value` where it is a finite number, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def _first_number(*values: Any) -> float | None:
    return next((value for value in values if number(value) is not None), None)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(path)
    except (OSError, DataError) as error:
        log.warning("%s is left out: %s", path, error)
        return []


def read_runs(sweep_dir: str | Path) -> list[RunRecord]:
    """The runs of a sweep, sorted by method, beta and seed.

    Raises:
        DataError: the folder is not there or holds no run.
    """
    root = Path(sweep_dir)
    if not root.is_dir():
        beside = [entry.name for entry in root.parent.iterdir() if entry.is_dir()] if root.parent.is_dir() else []
        meant = did_you_mean(root.name, beside, ": name the folder above the runs")
        raise DataError(f"sweep={root} is not a folder{meant}")
    jobs = {_relative(root, job["dir"]): job for job in read_jobs(root) if job.get("dir")}
    found = {path.parent.relative_to(root).as_posix() for path in root.glob("*/manifest.json")}
    runs = [read_run(root, path, jobs.get(path, {})) for path in sorted(found | jobs.keys())]
    runs = [run for run in runs if run.config or run.job or run.fault]  # the data tool leaves a manifest.json too
    if not runs:
        inside = " (it is itself a run: give the folder above)" if RunDirectory(root).manifest.exists() else ""
        raise DataError(f"sweep={root} holds no run{inside}: a run is a subfolder with manifest.json")
    return sorted(runs, key=lambda run: (run.method or "~", *_order(run.beta), *_order(run.seed), run.path))


def _order(value: float | None) -> tuple[bool, float]:
    return (value is None, value or 0.0)


def sweep_command(root: Path) -> str | None:
    """What was typed to start the sweep, secrets redacted, from Hydra's own record; None where it cannot be read."""
    try:
        recorded = yaml.safe_load((root / "multirun.yaml").read_text(encoding="utf-8"))["hydra"]
        folders, typed = own_folders(recorded["runtime"]["config_sources"]), recorded["overrides"]
        words = [*typed["task"], *(word for word in typed["hydra"] if not word.startswith("hydra.mode="))]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):  # a cut one is not always YAML that says so
        return None
    return shlex.join(["python", "-m", "dpo_kit", "-m", *redact_argv([*folders, *words])])


def read_jobs(root: Path) -> list[dict[str, Any]]:
    found, _ = _read(root / "sweep.json")
    return [job for job in found.get("jobs") or [] if isinstance(job, dict)]


def _relative(root: Path, path: str) -> str:
    """A job's folder as seen from the sweep's, whether it was written relative or absolute."""
    given = Path(path)
    for base in (root, root.resolve()):
        if given.is_relative_to(base):
            return given.relative_to(base).as_posix()
    return given.as_posix() if not given.is_absolute() else given.name


def read_run(root: Path, path: str, job: Mapping[str, Any]) -> RunRecord:
    """One run; a file that cannot be read is named in its `fault` and does not stop the others."""
    folder = root / path
    names = ("manifest.json", "result.json", "evaluation/result.json", "test.json")
    read = {name: _read(folder / name) for name in names}
    fault = next((fault for _, fault in read.values() if fault), None)
    manifest, result, judged, test = (read[name][0] for name in names)
    return RunRecord(folder, path, manifest, result, job, judged, test, fault)


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}, None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        return {}, f"{path.name} cannot be read: {error}"
    return (value, None) if isinstance(value, dict) else ({}, f"{path.name} is not a JSON object")


def swept_keys(runs: Sequence[RunRecord]) -> dict[str, dict[str, Any]]:
    """{key: {run path: value}} of the keys beside method, beta and seed in which the runs differ.

    From what was typed where that is recorded for every run, else from the configs of runs of the same method.
    """
    typed = {run.path: run.overrides for run in runs}
    if all(values is not None for values in typed.values()):
        values: dict[str, Mapping[str, Any]] = {path: given or {} for path, given in typed.items()}
        return _differing(values, [list(values)])
    values = {run.path: _flat(run.config) for run in runs if run.config}
    methods = {run.path: run.method for run in runs if run.config}
    return _differing(values, [[p for p in methods if methods[p] == name] for name in dict.fromkeys(methods.values())])


def _differing(values: Mapping[str, Mapping[str, Any]], groups: list[list[str]]) -> dict[str, dict[str, Any]]:
    keys = dict.fromkeys(key for given in values.values() for key in given)
    shown = [key for key in keys if key not in SELDOM_SWEPT and not key.startswith("method.")]
    return {
        key: {path: given.get(key) for path, given in values.items()}
        for key in shown
        if any(len({str(values[path].get(key)) for path in group}) > 1 for group in groups)
    }


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, item in tree.items() for key, value in _flat(item, f"{prefix}{name}.").items()}
