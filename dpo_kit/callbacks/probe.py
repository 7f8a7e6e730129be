"""The probe: fixed held-out rows, scored under the policy and the reference at step 0, at each eval and at
the end.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from dpo_kit.callbacks.scores import Scores
from dpo_kit.errors import DataError
from dpo_kit.model.batches import measuring, pad_token_id
from dpo_kit.model.head import Tokens
from dpo_kit.model.predicted import jittered
from dpo_kit.model.scoring import Reference, batch_size_in_tokens, fingerprint, score
from dpo_kit.model.tokens import ids_of_rows, truncate_both

logger = logging.getLogger(__name__)
Row = dict[str, Any]
FLOOR_ROWS = 32  # answers that are scored a second time to see what rounding does


class PairProbe:
    """Scores fixed held-out rows in any TRL trainer; PreferenceMargin and ImplicitReward share its one pass.

    `rows` are pairs (`prompt`, `chosen`, `rejected`) or unary (`prompt`, `completion`, `label`), text or chat
    messages as the trainer takes them, all of one form, with TRL's columns `tools` and `chat_template_kwargs`;
    `pair_id` and `prompt_id` are made up where absent.
    They are cut as the trainer cuts (`max_length`, `truncation_mode`); a row whose prompt leaves no room is
    left out.

    `beta` is the method's distance to the reference and turns logratios into rewards; None (ORPO, CPO, SimPO,
    where beta is no such distance) logs no rewards. `saturation` names the family of `metrics.SATURATION` or
    None. `path` is where probe.jsonl goes: one line per scoring and row.
    """

    def __init__(
        self,
        trainer: Trainer,
        rows: Sequence[Row],
        *,
        beta: float | None = None,
        saturation: str | None = None,
        reference: Reference | None = None,
        path: Path | None = None,
        tokens_per_batch: int | None = None,
    ) -> None:
        self.trainer, self.beta, self.saturation, self.path = trainer, beta, saturation, path
        self.reference = reference or Reference(trainer)
        self.tokens_per_batch = tokens_per_batch
        self.paired = bool(rows) and "chosen" in rows[0]
        self.rows, self._sequences, self._sides = _encode(trainer, rows, self.paired)
        self._tokens = torch.tensor([len(completion) for _, completion in self._sequences])
        self._reference_logps: Tensor | None = None
        self._scored: tuple[Any, int, bool] | None = None
        self._written_step: int | None = None
        self.reference_offset_nats = 0.0
        self.floor_nats = 0.0  # what rounding alone does to an answer's log-probability, root mean square

    def take(self, count: int) -> None:
        """Score only the first `count` rows, or the few more that unary ones need to be of both classes; to be called
        before anything is scored.
        """
        if not self.paired:
            labels = [bool(row["label"]) for row in self.rows]
            count = max(count, labels.index(True) + 1, labels.index(False) + 1)
        if count < len(self.rows):
            self.rows, self._sequences, self._sides = _arrange(self.rows[:count], self.by_row()[:count], self.paired)
            self._tokens = torch.tensor([len(completion) for _, completion in self._sequences])

    def by_row(self) -> list[list[Tokens]]:
        """The prompt and answer of each answer of each row, as token ids."""
        count = len(self.rows)
        return [self._sequences[index::count] for index in range(count)]

    def scores(self, *, kept: bool = False) -> Scores:
        """Scores at the trainer's present step, computed once per step.

        `kept` marks the model that training ends with, where that is an earlier checkpoint loaded back. The
        first call fixes the reference's side and checks the step-0 identity (ModelError); after a resume it
        is read back.
        """
        state = self.trainer.state
        moment = (state, state.global_step, kept)
        if self._scored is None or self._scored[0] is not state or self._scored[1:] != moment[1:]:
            self._scores = self._score_now(state.global_step)
            self._scored = moment
            self._write(self._scores)
        return self._scores

    def prepare(self) -> None:
        """Find the reference's log-probabilities again after a resume; ModelError where they are gone."""
        if self._reference_logps is None:
            with measuring(self.trainer, *self.reference.models):
                self._reference_logps = self._restore()

    def _score_now(self, step: int) -> Scores:
        with measuring(self.trainer, *self.reference.models):
            logps = self._score(self.trainer.model)
            if self._reference_logps is None:
                self._reference_logps = self._find_reference_logps(logps) if step == 0 else self._restore()
        chosen, rejected = ([index for index in side if index is not None] for side in self._sides)
        logratios = logps - self._reference_logps
        prompts_chosen, prompts_rejected = (self._prompt_ids(side) for side in self._sides)
        return Scores(
            step,
            self.paired,
            logratios[chosen],
            logratios[rejected],
            self._tokens[chosen],
            self._tokens[rejected],
            prompts_chosen,
            prompts_rejected,
            self.floor_nats,
        )

    def _score(self, model: Any) -> Tensor:
        self.tokens_per_batch = self.tokens_per_batch or batch_size_in_tokens(
            model
        )  # once: both models in equal batches
        return score(
            model,
            self._sequences,
            pad_id=self._pad_id,
            tokens_per_batch=self.tokens_per_batch,
            accelerator=self.trainer.accelerator,
        )

    @property
    def _pad_id(self) -> int:
        return pad_token_id(self.trainer.processing_class)  # type: ignore[arg-type]

    def _find_reference_logps(self, policy_logps: Tensor) -> Tensor:
        logps = policy_logps
        if not self.reference.is_policy:
            with self.reference.active() as model:
                logps = self._score(model)
        self.reference_offset_nats = self.reference.check_start(policy_logps - logps, self._tokens)
        if not self.reference.is_fp32():
            self.floor_nats = self._measure_floor(logps)
        kept = {"logps": logps, "tokens_per_batch": self.tokens_per_batch, "floor_nats": self.floor_nats}
        self.reference.save("pairs", {"fingerprint": fingerprint(self._sequences), **kept})
        return logps

    def _measure_floor(self, logps: Tensor) -> float:
        """The reference again on some of the rows, rounded otherwise: nats an answer."""
        some = list(range(0, len(self._sequences), max(1, len(self._sequences) // FLOOR_ROWS)))
        with self.reference.active() as model, jittered(model):
            again = score(model, [self._sequences[index] for index in some], pad_id=self._pad_id)
        return float((again - logps[some]).square().mean().sqrt())

    def _restore(self) -> Tensor:
        saved = self.reference.load("pairs", fingerprint(self._sequences))
        if saved is not None:
            self.tokens_per_batch, self.floor_nats = saved["tokens_per_batch"], saved["floor_nats"]
            return saved["logps"]
        with self.reference.required(self.trainer.state.global_step) as model:
            return self._score(model)

    def _prompt_ids(self, side: list[int | None]) -> list[str]:
        return [row["prompt_id"] for row, index in zip(self.rows, side, strict=True) if index is not None]

    def _write(self, scores: Scores) -> None:
        if self.path is None or not self.trainer.is_world_process_zero():
            return
        if self._written_step is None or self._written_step >= scores.step:
            _drop_lines_from(self.path, scores.step)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self._lines(scores))
        self._written_step = scores.step

    def _lines(self, scores: Scores) -> Iterator[Row]:
        chosen = zip(_plain(scores.logratio_chosen), scores.tokens_chosen.tolist(), strict=True)
        rejected = zip(_plain(scores.logratio_rejected), scores.tokens_rejected.tolist(), strict=True)
        for row, in_chosen, in_rejected in zip(self.rows, *self._sides, strict=True):
            first = next(chosen) if in_chosen is not None else (None, None)
            second = next(rejected) if in_rejected is not None else (None, None)
            yield {
                "step": scores.step,
                "pair_id": row["pair_id"],
                "prompt_id": row["prompt_id"],
                "logratio_chosen_nats": first[0],
                "logratio_rejected_nats": second[0],
                "tokens_chosen": first[1],
                "tokens_rejected": second[1],
            }


def name_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows with `pair_id` (the position) and `prompt_id` (equal where the prompt is) filled in where
    absent.
    """
    return [{"pair_id": str(index), "prompt_id": fingerprint(row["prompt"]), **row} for index, row in enumerate(rows)]


def _encode(
    trainer: Any,
    rows: Sequence[Row],
    paired: bool,
) -> tuple[list[Row], list[Tokens], tuple[list[int | None], list[int | None]]]:
    """Rows that can be scored, their sequences, and for chosen and rejected the sequence of each row (or
    None).
    """
    keys = ("chosen", "rejected") if paired else ("completion",)
    rows = name_rows(rows)
    encoded = ids_of_rows(trainer.processing_class, rows, keys)
    cut = [[_truncate(trainer.args, prompt, each) for each in completions] for prompt, completions in encoded]
    usable = [index for index, row in enumerate(cut) if all(completion for _, completion in row)]
    if not usable:
        raise DataError(f"probe rows: none of {len(rows)} has a completion within max_length; give held-out rows")
    if len(usable) < len(rows):
        logger.warning("probe: %d rows left out, their prompt fills max_length", len(rows) - len(usable))
    return _arrange([rows[index] for index in usable], [cut[index] for index in usable], paired)


def _truncate(args: Any, prompt_ids: list[int], completion_ids: list[int]) -> Tokens:
    # ORPO and CPO have no truncation mode: they cut the end, as "keep_start" does
    mode = getattr(args, "truncation_mode", "keep_start")
    return truncate_both(prompt_ids, completion_ids, args.max_length, mode)


def _arrange(
    rows: list[Row], cut: list[list[Tokens]], paired: bool
) -> tuple[list[Row], list[Tokens], tuple[list[int | None], list[int | None]]]:
    sequences = [row[column] for column in range(len(cut[0])) for row in cut]
    indices = range(len(rows))
    if paired:
        return rows, sequences, (list(indices), [len(rows) + index for index in indices])
    labels = [bool(row["label"]) for row in rows]
    if len(set(labels)) < 2:
        raise DataError("probe rows: unary rows need both labels, true and false; give held-out rows of either class")
    chosen = [index if label else None for index, label in zip(indices, labels, strict=True)]
    rejected = [None if label else index for index, label in zip(indices, labels, strict=True)]
    return rows, sequences, (chosen, rejected)


def _plain(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _drop_lines_from(path: Path, step: int) -> None:
    """Leave only lines of earlier steps: a resumed run scores again what the stopped one scored after its
    checkpoint.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    earlier = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(earlier), encoding="utf-8")
    partial.replace(path)
