"""TRL's trainer for a run: its arguments, its models, and the mixins that stand before it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_kit.config.best_metric import needs_trl_evaluation
from dpo_kit.config.settings import Settings
from dpo_kit.data.gather import sources
from dpo_kit.data.prepare import Prepared
from dpo_kit.model.load import (
    build_adapter,
    is_plain,
    keep_start,
    load_policy,
    load_reference,
    read_config,
    refuse_uncopied,
)
from dpo_kit.model.origin import read_adapter
from dpo_kit.model.trl_classes import import_class
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import cache_folder, write_json
from dpo_kit.run.processes import is_writer
from dpo_kit.run.quiet import phase
from dpo_kit.toy import is_out_of_its_world
from dpo_kit.trainer.arguments import build_arguments, count_steps, describe_arguments, effective_batch, uses_store
from dpo_kit.trainer.given_tokens import GivenTokens
from dpo_kit.trainer.measuring import ProbeAlone
from dpo_kit.trainer.mixins import with_mixins
from dpo_kit.trainer.prefix import LaidOut, shares_prefixes
from dpo_kit.trainer.reference_store import StoredReference
from dpo_kit.trainer.refusals import refusing
from dpo_kit.trainer.resume.safe_trainer import Kept, Safekeeping
from dpo_kit.trainer.room import surely_fits
from dpo_kit.trainer.rows import build_dataset, held_out_rows
from dpo_kit.trainer.speed import speed_up

log = logging.getLogger(__name__)


def build_trainer(
    settings: Settings,
    data: Prepared,
    tokenizer: Any,
    run: RunDirectory,
    reward: Any = None,
    origin: Mapping[str, Any] | None = None,
) -> Any:
    """TRL's trainer for the method: one keyword call serves them all.

    `reward` (online.JudgedReward) compares the answers that TRL draws; `origin` is what a checkpoint must share with
    the run that goes on from it.
    """
    adapter = build_adapter(settings.model)
    with refusing("TRL's arguments"):
        args = choose_arguments(settings, data, run.checkpoints)
    with phase("loading the weights"):
        policy = load_policy(settings.model, tokenizer)
    trl_trainer = import_class(settings.method.trainer)
    if adapter:
        from dpo_kit.trainer.targets import fit_targets

        fit_targets(adapter, policy, trl_trainer)
    if is_writer():
        write_json(run.trl_config, describe_arguments(args))
    given: dict[str, Any] = {"ref_model": load_reference(settings.model)} if needs_reference(settings, args) else {}
    if not settings.method.reference and settings.model.reference is None:
        keep_start(policy)  # for the probe; TRL's trainers with a reference have one
    elif settings.method.reference and not given:
        refuse_uncopied(policy)
    describe(settings, args, data)
    grouped = speed_up([policy, *given.values()], settings.speed, settings.trl, lengths=reward is None)
    if reward is not None:
        given |= {"reward_funcs": reward, "callbacks": [reward]}

    evaluates = needs_trl_evaluation(settings)
    mixins: list[type] = []
    if uses_store(settings, data.train):
        mixins.append(StoredReference)
    if not evaluates:
        mixins.append(ProbeAlone)
    if grouped:
        from dpo_kit.trainer.grouping import GroupedByLength

        mixins.append(GroupedByLength)
    mixins.append(Safekeeping)
    if reward is None:
        mixins.append(GivenTokens)
    else:
        from dpo_kit.trainer.online import FreshAnswers

        mixins.append(FreshAnswers)
    kept = Kept(
        origin=origin or {},
        record=run.record,
        pair_ids=[row["pair_id"] for row in data.train],
        spare_saves=settings.trl["save_steps"] is None,
    )
    trainer = with_mixins(trl_trainer, *mixins, kept=kept, root=cache_folder("reference"), evaluates=evaluates)
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
    if not is_plain(policy.config):
        from dpo_kit.trainer.families import fit_trainer

        fit_trainer(built)
    if shares_prefixes(policy):
        built.data_collator = LaidOut(built.data_collator)
    return built


def choose_arguments(settings: Settings, data: Prepared, checkpoints: Path) -> Any:
    """The TRL arguments, with activation checkpointing where the user left it open and memory would not do without.

    ModelError or ConfigError for a model of a family that cannot be trained, or not so.
    """
    config, rows = read_config(settings.model), data.train
    if not is_plain(config):
        from dpo_kit.trainer.families import fit_family

        fit_family(settings, config, data)
    width = getattr(config.get_text_config(), "hidden_size", 0)
    args = build_arguments(settings, rows, checkpoints, width)
    left_open = settings.trl["gradient_checkpointing"] is None and settings.speed.checkpointing == "auto"
    if not left_open or surely_fits(settings, args):
        return args
    from dpo_kit.trainer.memory import fits

    if fits(settings, args, rows, loads_reference=needs_reference(settings, args)):
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


def describe(settings: Settings, args: Any, data: Prepared) -> None:
    """What was chosen, in three lines, before it runs; a warning where the start model does not fit the method."""
    trl = args.to_dict()
    precision = next((name for name in ("bf16", "fp16") if trl[name]), "fp32")
    checkpointing = "on" if args.gradient_checkpointing else "off"
    log.info("%s, from %s", settings.method.title, settings.model.path)
    log.info(
        "%s tuning in %s on %s, activation checkpointing %s, learning rate %g",
        *(settings.model.tuning, precision, args.device.type, checkpointing, args.learning_rate),
    )
    log.info(
        "%d steps of %d rows out of %d; %d are held out",
        *(count_steps(trl, len(data.train)), effective_batch(trl), len(data.train), len(data.select)),
    )
    if is_out_of_its_world(settings.model.path, (source.path for source in sources(settings.data.train))):
        log.warning(
            "this tunes the embedded model, which knows its own small world only, on %s: your own is model=local "
            "model.path=…",
            settings.data.train,
        )
    if settings.experiment:
        from dpo_kit.trainer.published import batch_fault

        if fault := batch_fault(settings.experiment, trl, effective_batch(trl)):
            log.warning("not the published run of experiment=%s: %s", settings.experiment.name, fault)
    if settings.method.start == "instruct" and isinstance(data.select[0]["prompt"], str):
        log.warning(
            "%s starts from an instruction-tuned model, but this one has no chat template and trains on raw text: "
            "tune it on answers first, or take method=orpo",
            settings.method.name,
        )
