"""The probe: fixed held-out rows, scored under the policy and the reference at step 0, at each eval and at the end."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from dpo_kit.callbacks.reference import Reference, fingerprint
from dpo_kit.callbacks.scores import Scores
from dpo_kit.errors import DataError
from dpo_kit.model.batches import measuring, pad_token_id
from dpo_kit.model.head import Tokens
from dpo_kit.model.predicted import jittered
from dpo_kit.model.scoring import batch_size_in_tokens, score
from dpo_kit.model.tokens import Truncation, ids_of_rows
from dpo_kit.run.files import finite, write_text

logger = logging.getLogger(__name__)
Row = dict[str, Any]
FLOOR_ROWS = 32  # answers that are scored a second time to see what rounding does


class PairProbe:
    """Scores fixed held-out rows in any TRL trainer; PreferenceMargin and ImplicitReward share its one pass.

    `rows` are pairs (`prompt`, `chosen`, `rejected`) or unary (`prompt`, `completion`, `label`), text or chat messages
    as the trainer takes them, all of one form, with TRL's columns `tools` and `chat_template_kwargs`; `pair_id` and
    `prompt_id` are made up where absent. They are cut as the trainer cuts (`max_length`, `truncation_mode`); a row
    whose prompt leaves no room is left out.

    `beta` is the method's distance to the reference and turns logratios into rewards; None (ORPO, CPO, SimPO, where
    beta is no such distance) logs no rewards. `saturation` names the family of `metrics.SATURATION` or None. `path` is
    where probe.jsonl goes: one line per scoring and row.
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
        self._reference_logps: Tensor | None = None
        self._scored: tuple[Any, int, bool] | None = None
        self._written_step: int | None = None
        self._pad_id = pad_token_id(trainer.processing_class)  # type: ignore[arg-type]
        self.reference_offset_nats = 0.0
        self.floor_nats = 0.0  # what rounding alone does to an answer's log-probability, root mean square
        answers, cut = ("chosen", "rejected") if self.paired else ("completion",), Truncation.of(trainer.args).cut
        named = name_rows(rows)
        encoded = ids_of_rows(trainer.processing_class, named, answers)  # type: ignore[arg-type]
        sequences = [[cut(prompt, each) for each in completions] for prompt, completions in encoded]
        usable = [(row, own) for row, own in zip(named, sequences, strict=True) if all(answer for _, answer in own)]
        if not usable:
            raise DataError(f"probe rows: none of {len(rows)} has a completion within max_length; give held-out rows")
        if len(usable) < len(rows):
            logger.warning("probe: %d rows left out, their prompt fills max_length", len(rows) - len(usable))
        self._arrange(*map(list, zip(*usable, strict=True)))

    def _arrange(self, rows: list[Row], cut: list[list[Tokens]]) -> None:
        """Sequences: first answers of all `rows`, then second ones; and which rows have a chosen, and a rejected."""
        self.rows = rows
        self._sequences = [row[column] for column in range(len(cut[0])) for row in cut]
        self._tokens = torch.tensor([len(completion) for _, completion in self._sequences])
        self._sides = [
            [index for index, row in enumerate(rows) if self.paired or bool(row["label"]) == side]
            for side in (True, False)
        ]
        if not all(self._sides):
            what = "unary rows need both labels, true and false; give held-out rows of either class"
            raise DataError(f"probe rows: {what}")

    def take(self, count: int) -> None:
        """Score only the first `count` rows, or a few more for both classes; before anything is scored."""
        if not self.paired:
            count = max(count, *(side[0] + 1 for side in self._sides))
        if count < len(self.rows):
            self._arrange(self.rows[:count], self.by_row()[:count])

    def by_row(self) -> list[list[Tokens]]:
        """The prompt and answer of each answer of each row, as token ids."""
        count = len(self.rows)
        return [self._sequences[index::count] for index in range(count)]

    def scores(self, *, kept: bool = False) -> Scores:
        """Scores at the trainer's present step, computed once per step.

        `kept` marks the model that training ends with, where that is an earlier checkpoint loaded back. The first call
        fixes the reference's side and checks the step-0 identity (ModelError); after a resume it is read back.
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
        logratios, tokens = logps - self._reference_logps, self._tokens
        chosen, rejected = self._sides
        prompts_chosen, prompts_rejected = ([self.rows[index]["prompt_id"] for index in side] for side in self._sides)
        if self.paired:  # the second answers of all rows
            rejected = [len(self.rows) + index for index in rejected]
        of_tensors = (logratios[chosen], logratios[rejected], tokens[chosen], tokens[rejected])
        return Scores(step, self.paired, *of_tensors, prompts_chosen, prompts_rejected, self.floor_nats)

    def _score(self, model: Any) -> Tensor:
        # once: both models in equal batches
        self.tokens_per_batch = self.tokens_per_batch or batch_size_in_tokens(model)
        options: dict[str, Any] = {"tokens_per_batch": self.tokens_per_batch, "accelerator": self.trainer.accelerator}
        return score(model, self._sequences, pad_id=self._pad_id, **options)

    def _find_reference_logps(self, policy_logps: Tensor) -> Tensor:
        logps = policy_logps
        if not self.reference.is_policy:
            with self.reference.active() as model:
                logps = self._score(model)
        self.reference_offset_nats = self.reference.check_start(policy_logps - logps, self._tokens)
        if not self.reference.is_fp32():  # the reference again on some of the rows, rounded otherwise
            some = list(range(0, len(self._sequences), max(1, len(self._sequences) // FLOOR_ROWS)))
            with self.reference.active() as model, jittered(model):
                again = score(model, [self._sequences[index] for index in some], pad_id=self._pad_id)
            self.floor_nats = float((again - logps[some]).square().mean().sqrt())
        kept = {"logps": logps, "tokens_per_batch": self.tokens_per_batch, "floor_nats": self.floor_nats}
        self.reference.save("pairs", {"fingerprint": fingerprint(self._sequences), **kept})
        return logps

    def _restore(self) -> Tensor:
        if saved := self.reference.load("pairs", fingerprint(self._sequences)):
            self.tokens_per_batch, self.floor_nats = saved["tokens_per_batch"], saved["floor_nats"]
            return saved["logps"]
        with self.reference.required(self.trainer.state.global_step) as model:
            return self._score(model)

    def _write(self, scores: Scores) -> None:
        if self.path is None or not self.trainer.is_world_process_zero():
            return
        if (self._written_step is None or self._written_step >= scores.step) and self.path.exists():
            # only lines of earlier steps stay: a resumed run scores again what came after its checkpoint
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            earlier = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < scores.step]
            write_text(self.path, "".join(earlier))
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self._lines(scores))
        self._written_step = scores.step

    def _lines(self, scores: Scores) -> Iterator[Row]:
        columns: dict[str, dict[int, Any]] = {}
        for name in ("logratio_{}_nats", "tokens_{}"):
            for side, indices in zip(("chosen", "rejected"), self._sides, strict=True):
                values = getattr(scores, name.format(side).removesuffix("_nats")).tolist()
                columns[name.format(side)] = dict(zip(indices, values, strict=True))
        for index, row in enumerate(self.rows):
            named = {"step": scores.step, "pair_id": row["pair_id"], "prompt_id": row["prompt_id"]}
            yield named | finite({name: column.get(index) for name, column in columns.items()})


def name_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows with `pair_id` (the position) and `prompt_id` (equal where the prompt is) filled in where absent."""
    return [{"pair_id": str(index), "prompt_id": fingerprint(row["prompt"]), **row} for index, row in enumerate(rows)]
