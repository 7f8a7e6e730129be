"""The TRL config object of a run: the user's `trl` block, and what it left open decided from data and hardware."""

import math
import os
from pathlib import Path
from typing import Any

from hydra.utils import get_class

from dpo_kit.config.settings import Settings
from dpo_kit.config.trl_schema import load_schema
from dpo_kit.errors import ConfigError
from dpo_kit.model.hardware import precision_arguments
from dpo_kit.run.processes import world_size
from dpo_kit.run.redact import redact

Rows = list[dict[str, Any]]


def build_arguments(
    settings: Settings, rows: Rows, output_dir: Path, width: int, checkpointing: bool | None = None
) -> Any:
    """An object of the method's TRL config class, for training on `rows` a model of hidden size `width`.

    `checkpointing` says whether activations are computed again, where the user has left it open. ConfigError where the
    rows do not fill the only batch that would be trained on.
    """
    trl = settings.trl
    batch = trl["per_device_train_batch_size"] * world_size()
    if trl["dataloader_drop_last"] and len(rows) < batch:
        raise ConfigError(
            f"{len(rows)} rows are fewer than a batch of {batch}, of which trl.dataloader_drop_last=true keeps none: "
            f"take trl.per_device_train_batch_size={max(1, len(rows) // world_size())} or less, or more rows"
        )
    given = trl | decide(trl, rows, width)
    if trl["gradient_checkpointing"] is None:
        asked = settings.speed.checkpointing
        given["gradient_checkpointing"] = bool(checkpointing) if asked == "auto" else asked
    if uses_store(settings, rows):
        given["precompute_ref_log_probs"] = True
    fields = load_schema()["classes"][settings.method.config.rsplit(".", 1)[-1]]["fields"]
    meant = {key: value for key, value in given.items() if value is not None or "None" in fields[key]["type"]}
    reporter = settings.tracking.reporter
    own = {
        "output_dir": str(output_dir),
        "run_name": settings.tracking.name,
        "report_to": "none" if reporter in ("wandb", "none") else [reporter],  # wandb is a sink of our own
    }
    args = get_class(settings.method.config)(**meant, **own)
    args.mixed_precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"  # whatever the environment says
    return args


def describe_arguments(args: Any) -> dict[str, Any]:
    """The fields of a TRL config object as plain values, secrets redacted; its class takes them back as they are."""
    tokens = {name: getattr(args, name) for name in args.to_dict() if name.endswith("_token")}  # to_dict hides them all
    return redact(args.to_dict() | tokens)


def uses_store(settings: Settings, rows: Rows) -> bool:
    """Whether the reference's log-probabilities come from the store that runs share (see reference_store.py)."""
    given = settings.method.rows != "prompts"  # of answers that are yet to be drawn nothing can be stored
    fixed = settings.method.reference and given and not settings.trl.get("sync_ref_model")
    sees_all = count_steps(settings.trl, len(rows)) * effective_batch(settings.trl) >= len(rows)
    return fixed and (sees_all if settings.speed.reference_store == "auto" else settings.speed.reference_store)


def decide(trl: dict[str, Any], rows: Rows, width: int) -> dict[str, Any]:
    """Values for the fields that are null in `trl` and not left to TRL: precision, cadence, class weights."""
    chosen: dict[str, Any] = precision_arguments(trl, width)
    if asked := asked_of_accelerate(trl):
        chosen |= {"bf16": asked == "bf16", "fp16": asked == "fp16"}
    steps = count_steps(trl, len(rows))
    evaluate_every: float = max(1, min(500, steps // 10))
    between = trl["save_steps"]  # of checkpoints, of which the best is kept: then what divides the steps between two
    if between and trl["load_best_model_at_end"] and trl["save_strategy"] == "steps":
        fitting = (n for n in range(min(int(evaluate_every), int(between)), 0, -1) if between % n == 0)
        evaluate_every = between if between < 1 else next(fitting)
    cadence = {
        "logging_steps": max(1, min(10, steps // 20)),
        "eval_steps": evaluate_every,
        "save_steps": trl["eval_steps"] or evaluate_every,
    }
    chosen |= {key: value for key, value in cadence.items() if trl[key] is None}
    if trl["metric_for_best_model"] and trl["greater_is_better"] is None:
        from dpo_kit.config.best_metric import greater_is_better

        chosen["greater_is_better"] = greater_is_better(trl["metric_for_best_model"])
    if "desirable_weight" in trl and trl["desirable_weight"] is None:
        # both classes count the same: n_U / n_D (KTO, arXiv:2402.01306, eq. 9)
        up = sum(row["label"] for row in rows)
        even = (len(rows) - up) / up if 0 < up < len(rows) else 1.0
        chosen["desirable_weight"] = even * trl["undesirable_weight"]
    return chosen


def asked_of_accelerate(trl: dict[str, Any]) -> str | None:
    """The precision that `accelerate launch` was told; None where it was not, or the user has said it here."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if not asked or trl["bf16"] is not None or trl["fp16"]:
        return None
    if asked not in (known := ("no", "bf16", "fp16")):
        raise ConfigError(f"ACCELERATE_MIXED_PRECISION must be one of {', '.join(known)}, got {asked}")
    return asked


def count_steps(trl: dict[str, Any], rows: int) -> int:
    """Optimizer steps of the run, as transformers counts them."""
    if trl["max_steps"] > 0:
        return trl["max_steps"]
    whole = math.floor if trl["dataloader_drop_last"] else math.ceil
    batches = whole(rows / (trl["per_device_train_batch_size"] * world_size()))
    per_epoch = max(1, math.ceil(batches / trl["gradient_accumulation_steps"]))
    return math.ceil(trl["num_train_epochs"] * per_epoch)


def effective_batch(trl: dict[str, Any]) -> int:
    """Rows per optimizer step over all devices."""
    return trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"] * world_size()
