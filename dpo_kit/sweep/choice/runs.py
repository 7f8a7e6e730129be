"""The runs of a sweep as their directories tell them, one a subfolder, and sweep.json, where our launcher wrote it."""

import copy
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dpo_kit.config.compose import own_folders
from dpo_kit.config.identity import flatten
from dpo_kit.errors import DataError, did_you_mean
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json
from dpo_kit.run.history import last_step, latest, read_metrics, series
from dpo_kit.run.measures import HELD_OUT, KL_FLOOR, KLS
from dpo_kit.run.redact import redact_argv
from dpo_kit.run.report.numbers import is_number
from dpo_kit.run.rounding import in_rounding
from dpo_kit.run.statistics import means_by_name

log = logging.getLogger(__name__)
SELDOM_SWEPT = ("beta", "seed", "method", "trl.beta", "trl.seed", "trl.data_seed")  # shown anyway, or follow from these


class RunRecord:
    """One run of a sweep: what its files say, and what follows from them; {} or None where they do not say it. `path`:
    relative to the sweep directory, `job` the entry in sweep.json; `fault` names a file that cannot be read. As it was
    after `step` steps (see `way`), or at its end.
    """

    step: int | None = None
    end_is_gated = False  # of what was kept on the way: whether a regression gate was run on the run's end

    def __init__(self, sweep_dir: Path, path: str, job: Mapping[str, Any]) -> None:
        self.path, self.job, self.root = path, job, sweep_dir / path
        self.directory = run = RunDirectory(self.root)
        self.evaluation = _of_select(run.evaluation)
        files = (run.manifest, run.result, self.evaluation / "result.json", run.test)
        (self.manifest, self.result, self.judged, self.test), faults = zip(*map(_read, files), strict=True)
        self.fault = next(filter(None, faults), None)
        self.config: dict[str, Any] = self.manifest.get("config") or {}
        weights, model = self.manifest.get("model") or {}, self.config.get("model") or {}
        result, config, ended, reference = self.result, self.config, self.result.get("status"), model.get("reference")
        self.method = result.get("method") or (config.get("method") or {}).get("name") or job.get("method")
        self.beta = _first_number(result.get("beta"), config.get("beta"), job.get("beta"))
        self.seed = _first_number(result.get("seed"), config.get("seed"), job.get("seed"))
        self.tuning = result.get("tuning") or model.get("tuning")
        self.finished = ended == "done"  # and well: final, as the launcher may have died before it could note the end
        self.status = "done" if self.finished else str(job.get("state") or ended or "running or killed")
        self.error = None if self.finished else self.fault or result.get("error") or job.get("error")
        # wall-clock of the whole job where the launcher measured it, else of training
        self.seconds = _first_number(job.get("seconds"), (result.get("seconds") or {}).get("train"))
        start = str(weights.get("sha256") or f"{weights.get('path')}@{weights.get('revision')}")
        self.at_start: dict[str, Any] = result.get("start") or {}  # measured values of the step-0 model
        self.start_model = (start, str(reference or ""))  # what tells step-0 models apart
        self.start_name = Path(str(weights.get("path") or "unknown model")).name
        self.start_name += f" (reference {Path(reference).name})" if reference else ""

    @property
    def name(self) -> str:
        """What it is called in sentences."""
        return self.path if self.step is None else f"{self.path} at step {self.step}"

    @property
    def weights(self) -> Path:
        return self.directory.weights(self.step)

    def way(self) -> "list[RunRecord]":
        """The run as it was at each step whose weights were kept, then at its end."""
        last = self.result.get("steps")
        return [*(self._at(step) for step in self.directory.kept_steps() if step != last), self]

    def _at(self, step: int) -> "RunRecord":
        earlier = copy.copy(self)
        for of_the_end in ("measured", "probed", "pairs", "points_by_prompt"):
            vars(earlier).pop(of_the_end, None)
        earlier.end_is_gated = "gate" in self.judged
        earlier.step, earlier.evaluation = step, _of_select(self.directory.evaluation_of(step))
        earlier.judged, _ = _read(earlier.evaluation / "result.json")
        earlier.test, _ = _read(earlier.directory.test_of(step))
        return earlier

    @cached_property
    def measured(self) -> dict[str, float]:
        """{key: value} at the end of a run that has ended well; what `evaluate` found of held-out rows goes first."""
        if self.step is None:
            values = dict(self.result.get("final") or {}) if self.finished else {}
        else:
            values = latest([row for row in self.history if row.get("step") == self.step])
        values |= {f"probe/{key}": self.judged.get(key) for key in HELD_OUT} if self.is_evaluated else {}
        return {key: value for key, value in values.items() if number(value) is not None}

    @property
    def is_evaluated(self) -> bool:
        """Whether `evaluate` measured at least as many held-out rows as the probe, those that a choice may rest on."""
        done = (self.judged.get("parts") or {}).get("preferences", "done") == "done"
        rows = number(self.judged.get("held_out_rows")) or 0
        return self.finished and done and self.judged.get("split") == "select" and rows >= max(1, len(self.probed))

    @property
    def held_out_rows(self) -> int:
        """The number of rows that `measured` rests on; 0 where it is not known."""
        return self.judged["held_out_rows"] if self.is_evaluated else len(self.probed)

    def in_rounding(self, key: str) -> bool:
        """Whether what was measured at the end under `key` is no more than what rounding alone makes."""
        return in_rounding(key, self.measured)

    @cached_property
    def overrides(self) -> dict[str, str] | None:
        """What was typed for this job, by key; None where only Hydra recorded it: every start writes that anew."""
        typed = self.job.get("overrides")
        if typed is None and (command := self.manifest.get("command")):
            typed = [word for word in shlex.split(command) if "=" in word]
        if typed is None:
            return None
        pairs = (str(word).lstrip("+~").partition("=") for word in typed)
        return {key: value for key, _, value in pairs if not key.startswith("hydra")}

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; none where the file is broken, which the log says."""
        return _rows(self.directory.metrics)

    def series(self, key: str) -> dict[int, float]:
        return series(self.history, key)

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """The rows of samples.jsonl that name their prompt, as a test by prompt needs it."""
        return [row for row in _rows(self.directory.samples) if row.get("prompt_id") is not None]

    def gold_by_prompt(self, *, at_start: bool = False) -> dict[str, float]:
        """Gold reward of the answer to each prompt (or at step 0); {} where not recorded."""
        rows = [row for row in self.answers if number(row.get("gold_reward")) is not None]
        step = 0 if at_start else self.step or max({row["step"] for row in rows} - {0}, default=None)
        return {row["prompt_id"]: row["gold_reward"] for row in rows if row["step"] == step}

    @cached_property
    def probed(self) -> list[Mapping[str, Any]]:
        """The rows that the probe scored last."""
        rows = _rows(self.directory.probe)
        return last_step(rows if self.step is None else [row for row in rows if row.get("step") == self.step])

    @cached_property
    def pairs(self) -> dict[str, tuple[str, float]]:
        """{pair_id: (prompt_id, margin in nats)} at the end; {} for rows that are no pairs."""
        rows = _rows(self.evaluation / "preferences.jsonl") if self.is_evaluated else self.probed
        chosen, rejected = "logratio_chosen_nats", "logratio_rejected_nats"
        whole = [row for row in rows if None not in (row.get(chosen), row.get(rejected))]
        return {row["pair_id"]: (row["prompt_id"], row[chosen] - row[rejected]) for row in whole}

    @cached_property
    def points_by_prompt(self) -> dict[str, float]:
        """The mean points of the answers to each prompt in verdicts.jsonl; {} where nothing was judged."""
        rows = _rows(self.evaluation / "verdicts.jsonl")
        return means_by_name((row["prompt_id"], row["points"]) for row in rows if number(row.get("points")) is not None)

    @property
    def judged_by(self) -> tuple[Any, ...]:
        """What win rates must share to be compared: the judge, and whose answers stood against the policy's."""
        judge = {key: value for key, value in (self.judged.get("judge") or {}).items() if key != "controls_failed"}
        return (json.dumps(judge, sort_keys=True), self.judged.get("opponent"))

    def kl_key(self, direction: str) -> str:
        """The metric of the forward or reverse KL: Rao-Blackwell where it was affordable, else k1."""
        rb, k1 = KLS[direction]
        has_rb = rb in self.measured or (k1 not in self.measured and self.series(rb))
        return rb if has_rb else k1

    @property
    def kl_reverse_key(self) -> str:
        return self.kl_key("reverse")

    @property
    def kl_reverse(self) -> float | None:
        """At the end, nats per answer."""
        return self.measured.get(self.kl_reverse_key)

    @property
    def kl_floor(self) -> float:
        """The KL that rounding alone makes, nats per answer: no drift is told below it. 0 in float32."""
        return self.measured.get(KL_FLOOR, 0.0)

    @property
    def tokens_per_answer(self) -> float | None:
        """Mean length of the last fresh answers, EOS in; from KL per answer over KL per token where not recorded."""
        last = self.step or max((row["step"] for row in self.answers), default=None)
        lengths = [row["tokens"] for row in self.answers if row["step"] == last and number(row.get("tokens"))]
        if lengths and self.finished:
            return sum(lengths) / len(lengths)
        per_token = self.measured.get(f"{self.kl_reverse_key}_per_token")
        return self.kl_reverse / per_token if per_token and self.kl_reverse is not None else None


def number(value: Any) -> float | None:
    """`value` where it is a finite number, else None."""
    return value if is_number(value) and not isinstance(value, bool) else None


def _of_select(evaluation: Path) -> Path:
    """Where an evaluation on the select split is, which a choice reads: beside the other one, where that came first."""
    beside = evaluation / "select"
    return beside if (beside / "result.json").exists() else evaluation


def _first_number(*values: Any) -> float | None:
    return next((value for value in values if number(value) is not None), None)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(path)
    except (OSError, DataError) as error:
        log.warning("%s is left out: %s", path, error)
        return []


def read_runs(sweep_dir: str | Path) -> list[RunRecord]:
    """The runs of a sweep, sorted by method, beta and seed. DataError where the folder is not there or holds none."""
    root = Path(sweep_dir)
    if not root.is_dir():
        beside = [entry.name for entry in root.parent.iterdir() if entry.is_dir()] if root.parent.is_dir() else []
        meant = did_you_mean(root.name, beside, ": name the folder above the runs")
        raise DataError(f"sweep={root} is not a folder{meant}")
    jobs = {Path(job["dir"]).as_posix(): job for job in read_jobs(root) if job.get("dir")}
    folders = {path.parent.relative_to(root).as_posix() for path in root.glob("*/manifest.json")}
    runs = [RunRecord(root, path, jobs.get(path, {})) for path in sorted(folders | jobs.keys())]
    runs = [run for run in runs if run.config or run.job or run.fault]  # the data tool leaves a manifest.json too
    if not runs:
        inside = " (it is itself a run: give the folder above)" if RunDirectory(root).manifest.exists() else ""
        raise DataError(f"sweep={root} holds no run{inside}: a run is a subfolder with manifest.json")
    runs.sort(key=lambda run: (run.seed is None, run.seed or 0, run.path))
    return sorted(runs, key=lambda run: (run.method or "~", run.beta is None, run.beta or 0))


def read_jobs(sweep_dir: Path) -> list[dict[str, Any]]:
    """The jobs of a sweep directory's sweep.json; [] where it has none."""
    jobs = _read(sweep_dir / "sweep.json")[0].get("jobs") or []
    return [job for job in jobs if isinstance(job, dict)]


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    """The content of a JSON file, {} where there is none; and why it cannot be read."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError) as error:
        return {}, f"{path.name} cannot be read: {error}"
    return (value, None) if isinstance(value, dict) else ({}, f"{path.name} is not a JSON object")


def sweep_command(root: Path) -> str | None:
    """What was typed to start the sweep, secrets redacted, from Hydra's own record; None where it cannot be read."""
    try:
        recorded = yaml.safe_load((root / "multirun.yaml").read_text(encoding="utf-8"))["hydra"]
        folders, typed = own_folders(recorded["runtime"]["config_sources"]), recorded["overrides"]
        words = [*typed["task"], *(word for word in typed["hydra"] if not word.startswith("hydra.mode="))]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):  # a cut one is not always YAML that says so
        return None
    return shlex.join(["python", "-m", "dpo_kit", "-m", *redact_argv([*folders, *words])])


def swept_keys(runs: Sequence[RunRecord]) -> dict[str, dict[str, Any]]:
    """{key: {run path: value}} of the keys beside method, beta and seed in which the runs differ: from what was typed
    where that is recorded for every run, else from the configs of runs of the same method.
    """
    values = {run.path: run.overrides for run in runs if run.overrides is not None}
    groups = [list(values)]
    if len(values) < len(runs):
        configured = [run for run in runs if run.config]
        values = {run.path: flatten(run.config) for run in configured}
        groups = [[run.path for run in configured if run.method == method] for method in {r.method for r in configured}]
    keys = dict.fromkeys(key for given in values.values() for key in given)
    return {
        key: {path: given.get(key) for path, given in values.items()}
        for key in keys
        if key not in SELDOM_SWEPT
        and not key.startswith("method.")
        and any(len({str(values[path].get(key)) for path in group}) > 1 for group in groups)
    }


def name_lines(runs: Sequence[RunRecord]) -> dict[str, str]:
    """{run path: the line it belongs to}: its method, and its values of what is swept beside beta and seed."""
    names, swept = {}, swept_keys(runs)
    for run in runs:
        extra = (f"{key.removeprefix('trl.')} {values.get(run.path)}" for key, values in swept.items())
        names[run.path] = ", ".join([run.method or "?", *extra])
    return names
