"""A run's rows: read, reported, and as TRL is given them."""

from __future__ import annotations

import json
import logging
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets

from dpo_kit.config.best_metric import kind_fault
from dpo_kit.config.settings import Settings
from dpo_kit.data.prepare import Prepared, Rows, prepare
from dpo_kit.data.rows import ANSWERS, Kind
from dpo_kit.errors import ConfigError
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import write_json, write_jsonl
from dpo_kit.run.redact import redact

log = logging.getLogger(__name__)
AT_ONCE = 10_000  # rows whose ids are Python's integers at a time


def read_data(settings: Settings, tokenizer: Any) -> Prepared:
    """Rows for training and measuring, checked. Raises DataError."""
    return prepare(
        settings.data,
        wanted=settings.method.rows,
        tokenizer=tokenizer,
        max_length=settings.trl["max_length"],
        truncation=settings.trl.get("truncation_mode", "keep_start"),
        seed=settings.seed,
        fresh_tokens=settings.trl.get("max_new_tokens", 0),
    )


def prepare_data(settings: Settings, tokenizer: Any) -> Prepared:
    """Rows for training and measuring, with all that the run's data report says."""
    data = read_data(settings, tokenizer)
    if fault := kind_fault(settings.trl["metric_for_best_model"], data.kind, settings.callbacks.metrics):
        raise ConfigError(fault)
    if settings.data.reference_margin and data.kind == "pairs":
        from dpo_kit.data.report.preference import measure_preference, reference_margins

        pairs = data.train if settings.method.rows == "pairs" else data.select
        data.report["reference"] = measure_preference(reference_margins(pairs, settings, tokenizer))
    if settings.data.gold and data.kind == "pairs":
        from dpo_kit.callbacks.gold import label_ceiling, load_gold

        data.report["ceiling"] = label_ceiling(load_gold(settings.data.gold), data.select)
    return data


def report_data(data: Prepared, run: RunDirectory) -> None:
    """The report and the dropped rows, into the run directory."""
    write_json(run.data_report, data.report)
    log.info("read: %s", ", ".join(f"{path} as {form}" for path, form in data.report["forms"].items()))
    if about := [warning["about"] for warning in data.report["warnings"]]:
        log.info("the data report has something to say on %s: %s", ", ".join(dict.fromkeys(about)), run.data_report)
    if data.dropped:
        write_jsonl(run.dropped_rows, (redact(vars(fault)) for fault in data.dropped))
        reasons = (f"{count} ({reason})" for reason, count in data.report["dropped_by_reason"].items())
        log.info("rows dropped: %s", ", ".join(reasons))


def probe_rows(data: Prepared, settings: Settings) -> Rows:
    """The held-out rows that an evaluation takes at most (see budget.py)."""
    return data.select[: settings.callbacks.at_most("pairs")]


def held_out_rows(data: Prepared, settings: Settings) -> Rows:
    """The rows of the probe, for TRL's own evaluation: in the form that the method's trainer takes."""
    rows = probe_rows(data, settings)
    if settings.method.rows in (data.kind, "prompts"):
        return rows
    from dpo_kit.data.interleave import interleave, unpair

    return interleave(unpair(rows), settings.seed)


def build_dataset(rows: Rows, kind: Kind) -> Dataset:
    """What TRL is given, in the order of `rows`: token ids and labels; or prompts alone as JSON, since a table of chats
    would give every call the arguments of all.
    """
    if kind == "prompts":
        return Dataset.from_list([{"prompt": json.dumps(row["prompt"])} for row in rows])
    names, labels = ("prompt", *ANSWERS[kind]), ("label",) if kind == "unary" else ()
    types = {f"{name}_ids": List(Value("int32")) for name in names} | {name: Value("bool") for name in labels}

    def table(part: Rows) -> Dataset:
        ids = {f"{name}_ids": [row["ids"][name].tolist() for row in part] for name in names}
        return Dataset.from_dict(ids | {name: [row[name] for row in part] for name in labels}, Features(types))

    return concatenate_datasets([table(rows[start : start + AT_ONCE]) for start in range(0, len(rows), AT_ONCE)])
