"""TRL's trainer for a run: its arguments, its models, and the mixins that stand before it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_class

from dpo_kit.config.limits import needs_trl_evaluation
from dpo_kit.config.settings import Settings
from dpo_kit.data.gather import sources
from dpo_kit.data.prepare import Prepared, Rows
from dpo_kit.model.batches import mlp_width
from dpo_kit.model.hardware import ROOM, free_memory
from dpo_kit.model.load import is_plain, load_policy, load_reference, read_config
from dpo_kit.model.origin import find_start
from dpo_kit.model.scoring import TOKENS_PER_BATCH
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import cache_folder, write_json
from dpo_kit.run.processes import is_writer
from dpo_kit.run.quiet import phase
from dpo_kit.toy import is_out_of_its_world
from dpo_kit.trainer.arguments import build_arguments, count_steps, describe_arguments, effective_batch, uses_store
from dpo_kit.trainer.measuring import ProbeAlone
from dpo_kit.trainer.refusals import refusing
from dpo_kit.trainer.resume.safe_trainer import Kept, Safekeeping
from dpo_kit.trainer.rows import GivenTokens, build_dataset, held_out_rows
from dpo_kit.trainer.speed import shares_prefixes, speed_up

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
    model, method = settings.model, settings.method
    adapter = None
    if model.tuning != "full":
        from dpo_kit.model.adapter import build_adapter, fit_targets, keep_start, refuse_uncopied

        adapter = build_adapter(model)
    with refusing("TRL's arguments"):
        args = choose_arguments(settings, data, run.checkpoints)
    with phase("loading the weights"):
        policy = load_policy(model, tokenizer)
    trl_trainer, loads_reference = get_class(method.trainer), needs_reference(settings, args)
    if adapter:
        fit_targets(adapter, policy, trl_trainer)
    if model.tuning != "full" and not method.reference and model.reference is None:
        keep_start(policy)  # for the probe; TRL's trainers with a reference have one
    elif model.tuning != "full" and method.reference and not loads_reference:
        refuse_uncopied(policy)
    if is_writer():
        write_json(run.trl_config, describe_arguments(args))
    options: dict[str, Any] = {"ref_model": load_reference(model)} if loads_reference else {}
    announce(settings, args, data)
    grouped = speed_up([policy, *options.values()], settings.speed, settings.trl, lengths=reward is None)
    evaluates = needs_trl_evaluation(settings)
    kept = Kept(
        origin=origin or {},
        record=run.record,
        pair_ids=[row["pair_id"] for row in data.train],
        spare_saves=settings.trl["save_steps"] is None,
    )
    mixins = choose_mixins(settings, data.train, evaluates=evaluates, grouped=grouped, fresh=reward is not None)
    trainer = with_mixins(trl_trainer, *mixins, kept=kept, root=cache_folder("reference"), evaluates=evaluates)
    if reward is not None:
        options |= {"reward_funcs": reward, "callbacks": [reward]}
    with refusing("TRL's trainer"), phase("tokenising, and the reference pass"):
        built = trainer(
            model=policy,
            args=args,
            train_dataset=build_dataset(data.train, method.rows),
            eval_dataset=build_dataset(held_out_rows(data, settings), method.rows),
            processing_class=tokenizer,
            peft_config=adapter,
            **options,
        )
    if not is_plain(policy.config):
        from dpo_kit.trainer.families import fit_trainer

        fit_trainer(built)
    if shares_prefixes(policy):
        from dpo_kit.trainer.prefix import LaidOut

        built.data_collator = LaidOut(built.data_collator)
    return built


def choose_mixins(settings: Settings, rows: Rows, *, evaluates: bool, grouped: bool, fresh: bool) -> list[type]:
    """What stands before TRL's trainer in a run on `rows`, the first one outermost: whether TRL's own evaluation is
    used, whether batches hold rows of similar length, and whether answers are drawn while training.
    """
    mixins: list[type] = []
    if uses_store(settings, rows):
        from dpo_kit.trainer.reference_store import StoredReference

        mixins.append(StoredReference)
    if not evaluates:
        mixins.append(ProbeAlone)
    if grouped:
        from dpo_kit.trainer.grouping import GroupedByLength

        mixins.append(GroupedByLength)
    mixins.append(Safekeeping)
    if fresh:
        from dpo_kit.trainer.online import FreshAnswers

        return [*mixins, FreshAnswers]
    return [*mixins, GivenTokens]


def with_mixins(trainer: type, *mixins: type, **values: Any) -> type:
    """The class `trainer`, under its own name, with `mixins` before it in the method resolution order and `values` as
    class attributes: what they need to know is there before the trainer is made.
    """
    return type(trainer.__name__, (*mixins, trainer), values)


def choose_arguments(settings: Settings, data: Prepared, checkpoints: Path) -> Any:
    """The TRL arguments, with activation checkpointing where the user left it open and memory would not do without.

    ModelError or ConfigError for a model of a family that cannot be trained, or not so.
    """
    config, rows = read_config(settings.model), data.train
    if not is_plain(config):
        from dpo_kit.trainer.families import fit_family

        fit_family(settings, config, data)
    text = config.get_text_config()
    width = getattr(text, "hidden_size", 0)
    args = build_arguments(settings, rows, checkpoints, width)
    left_open = settings.trl["gradient_checkpointing"] is None and settings.speed.checkpointing == "auto"
    if not left_open or surely_fits(text, args):
        return args
    from dpo_kit.trainer.memory import fits

    if fits(settings, args, rows, loads_reference=needs_reference(settings, args)):
        return args
    return build_arguments(settings, rows, checkpoints, width, checkpointing=True)


def surely_fits(text: Any, args: Any) -> bool:
    """Whether a run needs so little that nobody has to count (memory.py): generously, from the sizes in `text`."""
    length = args.max_length or getattr(text, "max_position_embeddings", 2048)
    tokens = max(2 * args.per_device_train_batch_size * length, TOKENS_PER_BATCH)
    heads = getattr(text, "num_attention_heads", None) or 1
    width = 40 * text.hidden_size + 10 * mlp_width(text) + 4 * heads * length
    weights = text.num_hidden_layers * text.hidden_size * (4 * text.hidden_size + 3 * mlp_width(text))
    weights += 2 * text.vocab_size * text.hidden_size
    activations = 8 * tokens * (text.num_hidden_layers * width + 8 * text.vocab_size)
    return activations + 40 * weights <= ROOM * free_memory()


def needs_reference(settings: Settings, args: Any) -> bool:
    """Whether a reference model is loaded beside the policy, for TRL's trainer.

    Full tuning needs one, unless its log-probabilities are computed before the first step. A new adapter does not: the
    policy without it is the reference; nor does one that training goes on from, of which TRL keeps a copy, except in
    its trainer that draws answers, which would copy the whole policy.
    """
    if not settings.method.reference or settings.model.reference is not None:
        return settings.method.reference
    if settings.model.tuning == "full":
        return not getattr(args, "precompute_ref_log_probs", False)
    return settings.method.rows == "prompts" and bool(find_start(settings.model).adapter)


def announce(settings: Settings, args: Any, data: Prepared) -> None:
    """What was chosen, before it runs; warnings where model, data, method or batch are not made for each other."""
    trl, method, rows = args.to_dict(), settings.method, len(data.train)
    precision = next((name for name in ("bf16", "fp16") if trl[name]), "fp32")
    checkpointing = "on" if args.gradient_checkpointing else "off"
    log.info("%s, from %s", method.title, settings.model.path)
    log.info(
        f"{settings.model.tuning} tuning in {precision} on {args.device.type}, activation checkpointing "
        f"{checkpointing}, learning rate {args.learning_rate:g}"
    )
    steps, batch = count_steps(trl, rows), effective_batch(trl)
    log.info(f"{steps} steps of {batch} rows out of {rows}; {len(data.select)} are held out")
    if is_out_of_its_world(settings.model.path, (source.path for source in sources(settings.data.train))):
        log.warning(
            "this tunes the embedded model, which knows its own small world only, on %s: your own is model=local "
            "model.path=…",
            settings.data.train,
        )
    if settings.experiment:
        from dpo_kit.trainer.published import batch_fault

        if fault := batch_fault(settings.experiment, trl, batch):
            log.warning("not the published run of experiment=%s: %s", settings.experiment.name, fault)
    if method.start == "instruct" and isinstance(data.select[0]["prompt"], str):
        log.warning(
            "%s starts from an instruction-tuned model, but this one has no chat template and trains on raw text: "
            "tune it on answers first, or take method=orpo",
            method.name,
        )
