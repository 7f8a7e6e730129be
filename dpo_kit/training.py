"""One run, from a composed config to a run directory: the page to read first.

cfg → check → tokenizer, data → policy, reference → TRL's trainer with our callbacks → model, result.json
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo_kit import toy
from dpo_kit.callbacks.gold import label_ceiling, load_gold
from dpo_kit.config.best_metric import kind_fault, needs_trl_evaluation
from dpo_kit.config.compose import check, own_folders
from dpo_kit.config.identity import origin, refuse_other_run
from dpo_kit.config.settings import Settings
from dpo_kit.data.interleave import interleave, unpair
from dpo_kit.data.prepare import Prepared, Rows, prepare
from dpo_kit.data.report.preference import measure_preference, reference_margins
from dpo_kit.data.rows import ANSWERS, Kind
from dpo_kit.errors import ConfigError, DpoKitError, TrainingError
from dpo_kit.model.load import (
    build_adapter,
    check_targets,
    keep_start,
    load_policy,
    load_reference,
    load_tokenizer,
    read_config,
    refuse_uncopied,
    rounded_share,
)
from dpo_kit.model.origin import read_adapter
from dpo_kit.model.trl_classes import import_class
from dpo_kit.run import tracking
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import cache_folder, write_json, write_jsonl
from dpo_kit.run.lock import only_writer
from dpo_kit.run.processes import is_writer, launcher
from dpo_kit.run.quiet import phase, quiet_libraries
from dpo_kit.run.redact import redact, redact_argv
from dpo_kit.run.report.diagnosis import held_back
from dpo_kit.trainer.arguments import build_arguments, count_steps, describe_arguments, effective_batch, uses_store
from dpo_kit.trainer.finish import Result, finish_run, write_failure
from dpo_kit.trainer.given_tokens import with_given_tokens
from dpo_kit.trainer.grouping import with_length_groups
from dpo_kit.trainer.manifest import build_manifest, keep_date
from dpo_kit.trainer.measuring import add_callbacks, probe_rows, with_probe_alone
from dpo_kit.trainer.memory import fits
from dpo_kit.trainer.online import JudgedReward, open_reward, with_fresh_answers
from dpo_kit.trainer.prefix import LaidOut, shares_prefixes
from dpo_kit.trainer.published import batch_fault
from dpo_kit.trainer.reference_store import with_store
from dpo_kit.trainer.resume.checkpoints import explain_full_disk
from dpo_kit.trainer.resume.find import begin_from, find_checkpoint, how_to_go_on
from dpo_kit.trainer.resume.safe_trainer import with_safekeeping
from dpo_kit.trainer.resume.signals import Interrupted
from dpo_kit.trainer.speed import speed_up

log = logging.getLogger(__name__)
AT_ONCE = 10_000  # rows whose ids are Python's integers at a time


def train(cfg: DictConfig, run_dir: str | Path | None = None) -> Result:
    """Train as `cfg` says and leave a run directory; the same as `python -m dpo_kit` with the same config.

    `cfg` comes from `compose`; `run_dir` defaults to a time stamp under outputs/. A directory that holds a finished run
    of this config is read, not trained again; an unfinished one goes on from its newest whole checkpoint. Ctrl-C and
    SIGTERM save at the next step, then raise KeyboardInterrupt and SystemExit(143). Raises ConfigError, DataError,
    ModelError before training, TrainingError during and after it.
    """
    settings = check(cfg)
    run = RunDirectory(Path(run_dir or time.strftime("outputs/%Y%m%d-%H%M%S")))
    refuse_other_run(run, settings)
    if (ended := run.read_result()) and ended["status"] == "done":
        return Result.read(run.root)
    with only_writer(run.root) if is_writer() else contextlib.nullcontext():
        return _train(settings, run)


def _train(settings: Settings, run: RunDirectory) -> Result:
    if is_writer():
        run.result.unlink(missing_ok=True)  # how an earlier start ended; none of it means running or killed
    quiet_libraries()
    tokenizer = load_tokenizer(settings.model)
    date = keep_date(run, tokenizer)
    with phase("reading the rows"):
        data = prepare_data(settings, tokenizer, run)
    manifest = build_manifest(settings, data, typed_command(), tokenizer, date)
    checkpoint = find_checkpoint(settings, run, manifest)
    begin_from(run, checkpoint)
    if is_writer():
        write_json(run.manifest, manifest)
    tracker = start_tracking(settings, manifest, run)
    try:
        with open_reward(settings, run) as reward:
            trainer = build_trainer(settings, data, tokenizer, run, reward)
            add_callbacks(trainer, settings, data, run, tracker)
            known = look_for_brakes(trainer, data)
            pair_ids = [row["pair_id"] for row in data.train]
            spare = settings.trl["save_steps"] is None
            trainer.keep(origin=origin(manifest), record=run.record, pair_ids=pair_ids, spare_saves=spare)
            seconds = run_trainer(trainer, run, checkpoint, manifest["command"])
            judge, ceiling = reward.summary() if reward else None, data.report.get("ceiling")
            result = finish_run(
                trainer, settings, run, tracker, seconds=seconds, ceiling=ceiling, judge=judge, known=known
            )
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
            if is_writer():
                write_failure(run, settings, error)
        tracker.finish(exit_code=1)
        raise
    tracker.finish()
    return result


def look_for_brakes(trainer: Any, data: Prepared) -> list[Any]:
    """What will keep this run from moving, said before its first step (see diagnosis.held_back)."""
    steps = count_steps(trainer.args.to_dict(), len(data.train))
    known = held_back(trainer.args, steps, rounded_share(trainer.model, trainer.args.learning_rate))
    for finding, _ in known:
        log.warning("%s %s", finding.symptom, finding.remedy)
    return known


def run_trainer(trainer: Any, run: RunDirectory, checkpoint: Path | None, command: str | None) -> float:
    """Train, from `checkpoint` where there is one; the seconds of all starts together.

    Raises KeyboardInterrupt or SystemExit where a signal stopped it, once what it had done is saved, and TrainingError
    where the disk is full.
    """
    started = time.time()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory at step {trainer.state.global_step + 1}: take speed.checkpointing=true, fewer rows at a "
            "time (trl.per_device_train_batch_size, and as many times more trl.gradient_accumulation_steps), or "
            "model.tuning=lora"
        ) from error
    except OSError as error:
        raise explain_full_disk(error, run.root) from error
    except (DpoKitError, RecursionError):
        raise
    except Exception as error:
        raise explain_stop(error, trainer.state.global_step) from error
    except Interrupted:
        log.info("stopped after step %d; to go on: %s", trainer.state.global_step, how_to_go_on(run, command))
        raise trainer.stop.exception() from None
    if trainer.state.global_step == 0:
        raise TrainingError("the trainer took no step: see how many rows a step takes, and trl.num_train_epochs")
    return trainer.seconds_before + time.time() - started


def prepare_data(settings: Settings, tokenizer: Any, run: RunDirectory) -> Prepared:
    """Rows for training and measuring, with the report and the dropped rows written to the run directory."""
    data = read_data(settings, tokenizer)
    if fault := kind_fault(settings.trl["metric_for_best_model"], data.kind, settings.callbacks.metrics):
        raise ConfigError(fault)
    if settings.data.reference_margin and data.kind == "pairs":
        pairs = data.train if settings.method.rows == "pairs" else data.select
        data.report["reference"] = measure_preference(reference_margins(pairs, settings, tokenizer))
    if settings.data.gold and data.kind == "pairs":
        data.report["ceiling"] = label_ceiling(load_gold(settings.data.gold), data.select)
    if not is_writer():
        return data
    write_json(run.data_report, data.report)
    log.info("read: %s", ", ".join(f"{path} as {form}" for path, form in data.report["forms"].items()))
    if about := [warning["about"] for warning in data.report["warnings"]]:
        log.info("the data report has something to say on %s: %s", ", ".join(dict.fromkeys(about)), run.data_report)
    if data.dropped:
        write_jsonl(run.dropped_rows, (redact(vars(fault)) for fault in data.dropped))
        reasons = (f"{count} ({reason})" for reason, count in data.report["dropped_by_reason"].items())
        log.info("rows dropped: %s", ", ".join(reasons))
    return data


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


def typed_command() -> str | None:
    """What was typed to start this run, secrets redacted; None from Python."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    own = own_folders(hydra.runtime.config_sources)
    words = [word for word in hydra.overrides.task if not word.startswith("beta-sweep=")]  # of this run only
    return shlex.join([*(launcher() or ["python"]), "-m", "dpo_kit", *redact_argv([*own, *words])])


def start_tracking(settings: Settings, manifest: dict[str, Any], run: RunDirectory) -> tracking.Tracker:
    """A wandb run, or a tracker that does nothing where another reporter or none is chosen."""
    if settings.tracking.reporter != "wandb" or not is_writer():
        return tracking.Tracker()
    options, wanted = settings.tracking.model_dump(exclude={"reporter"}), os.environ.get("WANDB_RUN_ID")
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:  # variables that all jobs share
        wanted = None
        if options["name"] == os.environ.get("WANDB_NAME"):
            options["name"] += f"-{run.root.name}"
    return tracking.start(manifest["config"], run_dir=run.root, run_id=run.wandb_id(wanted), **options)


def build_trainer(
    settings: Settings, data: Prepared, tokenizer: Any, run: RunDirectory, reward: JudgedReward | None = None
) -> Any:
    """TRL's trainer for the method: one keyword call serves them all. `reward` compares the answers that TRL draws."""
    adapter = build_adapter(settings.model)
    with refusing("TRL's arguments"):
        width = read_config(settings.model).get_text_config().hidden_size
        args = choose_arguments(settings, data.train, run.checkpoints, width)
    with phase("loading the weights"):
        policy = load_policy(settings.model, tokenizer)
    if adapter:
        check_targets(adapter, policy, import_class(settings.method.trainer))
    if is_writer():
        write_json(run.trl_config, describe_arguments(args))
    given: dict[str, Any] = {"ref_model": load_reference(settings.model)} if needs_reference(settings, args) else {}
    if not settings.method.reference and settings.model.reference is None:
        keep_start(policy)  # for the probe; TRL's trainers with a reference have one
    elif settings.method.reference and not given:
        refuse_uncopied(policy)
    describe(settings, args, data)
    grouped = speed_up([policy, *given.values()], settings.speed, settings.trl, lengths=reward is None)
    trainer = compose_trainer(settings, data.train, grouped=grouped, draws=reward is not None)
    if reward is not None:
        given["reward_funcs"] = reward
    with refusing("TRL's trainer"), phase("tokenising, and the reference pass"):
        built = trainer(
            model=policy,
            args=args,
            train_dataset=build_dataset(data.train, settings.method.rows),
            eval_dataset=build_dataset(held_out_rows(data, settings), settings.method.rows),
            processing_class=tokenizer,
            peft_config=adapter,
            **given,
        )
    if shares_prefixes(policy):
        built.data_collator = LaidOut(built.data_collator)
    if reward is not None:
        reward.trainer = built
        built.add_callback(reward)
    return built


def compose_trainer(settings: Settings, rows: Rows, *, grouped: bool, draws: bool) -> type:
    """The method's TRL trainer with what surrounds it: batches of rows `grouped` by length, answers that it `draws`."""
    evaluates = needs_trl_evaluation(settings)
    trainer = import_class(settings.method.trainer)
    trainer = with_safekeeping(with_fresh_answers(trainer) if draws else with_given_tokens(trainer))
    if grouped:
        trainer = with_length_groups(trainer)
    if not evaluates:
        trainer = with_probe_alone(trainer)
    if uses_store(settings, rows):
        trainer = with_store(trainer, cache_folder("reference"), evaluates=evaluates)
    return trainer


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """What `what` raises of its own, as a ConfigError with the keys that were typed: it refuses what they say."""
    try:
        yield
    except (DpoKitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"{what} refuse {blamed(error)}{where_told(error)}") from error


def explain_stop(error: Exception, step: int) -> TrainingError:
    """What stopped training in a library, with the keys that may be the cause."""
    when = f"at step {step + 1}" if step else "before its first step"
    return TrainingError(f"training stopped {when}; typed: {blamed(error)}{where_told(error)}")


def blamed(error: Exception) -> str:
    """The overrides that `error` may be about, all where it names none, and what it says."""
    text = f"{type(error).__name__}: {str(error).strip()}"
    typed = typed_words()
    named = [word for word in typed if set(re.findall(r"\w{4,}", word)) & set(re.findall(r"\w{4,}", text))]
    return f"{' '.join(redact_argv(named or typed)) or 'this config'}: {text}"


def typed_words() -> list[str]:
    """The overrides of this run that were typed; none from Python."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def where_told(error: Exception) -> str:
    """The traceback goes to the log of the run alone; where that is."""
    logging.getLogger("traceback").warning("%s", error, exc_info=error)
    if not HydraConfig.initialized():
        return ""
    hydra = HydraConfig.get()
    return f" (traceback: {Path(hydra.runtime.output_dir) / hydra.job.name}.log)"


def choose_arguments(settings: Settings, rows: Rows, checkpoints: Path, width: int) -> Any:
    """The TRL arguments, with activation checkpointing where the user left it open and memory would not do without."""
    args = build_arguments(settings, rows, checkpoints, width)
    left_open = settings.trl["gradient_checkpointing"] is None and settings.speed.checkpointing == "auto"
    if not left_open or fits(settings, args, rows, loads_reference=needs_reference(settings, args)):
        return args
    return build_arguments(settings, rows, checkpoints, width, checkpointing=True)


def needs_reference(settings: Settings, args: Any) -> bool:
    """Whether TRL needs a reference of its own. LoRA has the policy without adapter, or a copy of the adapter that
    training goes on from; precomputing has the start. TRL's trainer that draws answers would copy such a policy whole.
    """
    if not settings.method.reference:
        return False
    if settings.model.tuning == "full":
        has_none = not getattr(args, "precompute_ref_log_probs", False)
    else:
        has_none = settings.method.rows == "prompts" and read_adapter(settings.model) is not None
    return has_none or settings.model.reference is not None


def held_out_rows(data: Prepared, settings: Settings) -> Rows:
    """The rows of the probe, for TRL's own evaluation: in the form that the method's trainer takes."""
    rows = probe_rows(data, settings)
    fits_method = settings.method.rows in (data.kind, "prompts")
    return rows if fits_method else interleave(unpair(rows), settings.seed)


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


def describe(settings: Settings, args: Any, data: Prepared) -> None:
    """What was chosen, in three lines, before it runs; a warning where the start model does not fit the method."""
    trl = args.to_dict()
    precision = next((name for name in ("bf16", "fp16") if trl[name]), "fp32")
    checkpointing = "on" if args.gradient_checkpointing else "off"
    every = "step" if args.eval_steps == 1 else f"{args.eval_steps:g} steps"
    log.info("%s, from %s", settings.method.title, settings.model.path)
    log.info(
        "%s tuning in %s on %s, activation checkpointing %s, learning rate %g",
        *(settings.model.tuning, precision, args.device.type, checkpointing, args.learning_rate),
    )
    log.info(
        "%d steps of %d rows out of %d, evaluated every %s on %d of %d held-out ones",
        *(count_steps(trl, len(data.train)), effective_batch(trl), len(data.train), every),
        *(len(probe_rows(data, settings)), len(data.select)),
    )
    if Path(settings.model.path) == toy.MODEL and not str(settings.data.train).startswith(str(toy.MODEL.parent)):
        log.warning(
            "this tunes the embedded model, which knows its own small world only, on %s: your own is model=local "
            "model.path=…",
            settings.data.train,
        )
    if fault := batch_fault(settings.experiment, trl, effective_batch(trl)):
        log.warning("not the published run of experiment=%s: %s", getattr(settings.experiment, "name", ""), fault)
    if settings.method.start == "instruct" and isinstance(data.select[0]["prompt"], str):
        log.warning(
            "%s starts from an instruction-tuned model, but this one has no chat template and trains on raw text: "
            "tune it on answers first, or take method=orpo",
            settings.method.name,
        )
