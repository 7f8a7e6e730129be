"""A run's rows: read, reported, and as TRL is given them."""

import json
import logging
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets

from dpo_kit.config.settings import Settings
from dpo_kit.data.prepare import Prepared, Rows, prepare
from dpo_kit.data.rows import ANSWERS, Kind
from dpo_kit.errors import ConfigError
from dpo_kit.model.tokens import Truncation
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import write_json, write_jsonl
from dpo_kit.run.redact import redact

log = logging.getLogger(__name__)
Base: Any = object  # in use, a trainer follows in the method resolution order
AT_ONCE = 10_000  # rows whose ids are Python's integers at a time


def read_data(settings: Settings, tokenizer: Any) -> Prepared:
    """Rows for training and measuring, checked. Raises DataError."""
    truncation = Truncation.of(settings.trl)
    return prepare(
        settings.data,
        wanted=settings.method.rows,
        tokenizer=tokenizer,
        max_length=truncation.max_length,
        truncation=truncation.mode,
        seed=settings.seed,
        fresh_tokens=settings.trl.get("max_new_tokens", 0),
    )


def prepare_data(settings: Settings, tokenizer: Any) -> Prepared:
    """Rows for training and measuring, with all that the run's data report says."""
    data = read_data(settings, tokenizer)
    metric, own = settings.trl["metric_for_best_model"], settings.callbacks.metrics
    if metric or own:
        from dpo_kit.config.best_metric import kind_fault

        if fault := kind_fault(metric, data.kind, own):
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


def held_out_rows(data: Prepared, settings: Settings) -> Rows:
    """The rows of the probe, for TRL's own evaluation: in the form that the method's trainer takes."""
    rows = data.select[: settings.callbacks.at_most("pairs")]
    if settings.method.rows in (data.kind, "prompts"):
        return rows
    from dpo_kit.data.other_rows import interleave, unpair

    return interleave(unpair(rows), settings.seed)


def build_dataset(rows: Rows, kind: Kind) -> Dataset:
    """What TRL is given: token ids and labels; or prompts as JSON, as a table would mix their chats' arguments."""
    if kind == "prompts":
        return Dataset.from_list([{"prompt": json.dumps(row["prompt"])} for row in rows])
    names, labels = ("prompt", *ANSWERS[kind]), ("label",) if kind == "unary" else ()
    types = {f"{name}_ids": List(Value("int32")) for name in names} | {name: Value("bool") for name in labels}

    def table(part: Rows) -> Dataset:
        ids = {f"{name}_ids": [row["ids"][name].tolist() for row in part] for name in names}
        return Dataset.from_dict(ids | {name: [row[name] for row in part] for name in labels}, Features(types))

    return concatenate_datasets([table(rows[start : start + AT_ONCE]) for start in range(0, len(rows), AT_ONCE)])


class GivenTokens(Base):
    """Mixin before a TRL trainer: `prompt_ids` and the ids of the answers are trained as they are.

    TRL's trainers read texts each in its own way: ORPO and CPO add a BOS and an EOS that the chat template does not
    write (huggingface/trl#1591, #4481) and leave out tools. Each has one of the two methods below.
    """

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """DPO and KTO: nothing is left to do but KTO's mismatched pairs, each answer with the prompt of the next row of
        its batch, as TRL makes them."""
        if not getattr(self, "calculate_KL", False) or "KL_completion_ids" in dataset.column_names:
            return dataset
        size, answers = args.per_device_train_batch_size, dataset["completion_ids"][:]
        batches = [answers[start : start + size] for start in range(0, len(answers), size)]
        return dataset.add_column("KL_completion_ids", [ids for batch in batches for ids in [batch[-1], *batch[:-1]]])

    def tokenize_row(self, row: Any, *_: Any) -> Any:
        """ORPO and CPO: whole sequences, cut at `max_length`, with labels where the answer is."""
        prompt = row["prompt_ids"]
        made = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for name in ("chosen", "rejected"):
            ids = (prompt + row[f"{name}_ids"])[: self.max_length]
            made[f"{name}_input_ids"], made[f"{name}_attention_mask"] = ids, [1] * len(ids)
            made[f"{name}_labels"] = ([-100] * len(prompt) + ids[len(prompt) :])[: self.max_length]
        return made
