"""Which rows a step that is not finite came from, and why that usually happens; loaded once a run has such a step."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

ANSWER_IDS = ("chosen_ids", "rejected_ids", "completion_ids")
WHOLE_IDS = ("chosen_input_ids", "rejected_input_ids")
SHOWN_ROWS = 16


def describe_step(trainer: Any, batches: Sequence[tuple[Tensor, Any]], norm: Any, pair_ids: Sequence[str]) -> str:
    """What was not finite, at which step, in which rows, and why that usually happens."""
    losses = [loss for loss, _ in batches if not loss.isfinite()]
    bad = [inputs for loss, inputs in batches if not loss.isfinite()]
    what = f"the loss is {float(losses[0]):g}" if losses else f"the norm of the gradient is {float(norm):g}"
    rows = sorted({row for inputs in bad or [each for _, each in batches] for row in find_rows(trainer, inputs)})
    named = [pair_ids[row] if len(pair_ids) == len(trainer.train_dataset) else f"row {row}" for row in rows]
    shown = ", ".join(named[:SHOWN_ROWS]) + (f" and {len(named) - SHOWN_ROWS} more" if len(named) > SHOWN_ROWS else "")
    return (
        f"{what} at step {trainer.state.global_step + 1}, found before the weights were changed; the rows of the "
        f"batch (pair_id): {shown or 'unknown'}. {likely_cause(trainer, bad, rows)}"
    )


def likely_cause(trainer: Any, bad: Sequence[Any], rows: Sequence[int]) -> str:
    """The first of the usual causes that holds, with its remedy."""
    if not all(p.isfinite().all() for p in trainer.model.parameters() if p.is_floating_point()):
        return "Likely cause: the weights that training started from are not finite; take another model.path."
    masks = (mask for inputs in bad for name, mask in inputs.items() if name.endswith("completion_mask"))
    if any(not any(answer) for mask in masks for answer in mask.tolist()):
        return "Likely cause: an answer without a token left after truncation; raise trl.max_length or drop the row."
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    if len(norms) > 1 and norms[-1] > 10 * min(norms):
        return (
            f"Likely cause: training diverges (the gradient's norm rose from {min(norms):.3g} to {norms[-1]:.3g}); "
            f"lower trl.learning_rate ({trainer.args.learning_rate:g}) or raise beta."
        )
    return (
        "Likely cause: these rows (look at them in the data; very long or degenerate answers overflow), or a precision "
        f"too low for this model (try trl.bf16=false), or trl.learning_rate={trainer.args.learning_rate:g} too high."
    )


def find_rows(trainer: Any, inputs: Any) -> list[int]:
    """The rows of the trainer's data set whose tokens are in a batch; compared only once something went wrong."""
    wanted: set[tuple[int, ...]] = set()
    for name, mask in inputs.items():
        if name.endswith("attention_mask") and not name.startswith(("prompt_", "KL_")):
            ids = inputs[f"{name.removesuffix('attention_mask')}input_ids"]
            wanted |= {tuple(row[on.bool()].tolist()) for row, on in zip(ids, mask, strict=True)}
    if not wanted and "prompt" in inputs:  # answers that the trainer has drawn itself
        return [row for row, prompt in enumerate(trainer.train_dataset["prompt"]) if prompt in inputs["prompt"]]
    lengths = {len(each) for each in wanted} - {0}  # shorter than the row where the trainer has cut it
    rows = []
    for row, example in enumerate(trainer.train_dataset):
        wholes = [[*example["prompt_ids"], *example[name]] for name in ANSWER_IDS if name in example]
        wholes += [list(example[name]) for name in WHOLE_IDS if name in example]
        parts = ({tuple(ids[:n]), tuple(ids[-n:])} for ids in wholes for n in lengths if n <= len(ids))
        if any(part & wanted for part in parts):
            rows.append(row)
    return rows
