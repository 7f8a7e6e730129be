"""Log-probabilities of completions under the policy and the reference, without logits of prompt positions."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer

from dpo_kit.errors import ModelError
from dpo_kit.sampling import pad_batch

logger = logging.getLogger(__name__)

Tokens = tuple[list[int], list[int]]
"""Ids of a prompt and of its completion."""

TOKENS_PER_BATCH = 8192
LOGITS_BYTES = 2**29
_CHUNK = 1024  # positions whose fp32 log-probabilities are held at once


def length_sorted_batches(sequences: Sequence[Tokens], tokens_per_batch: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, each at most `tokens_per_batch` padded tokens (or
    one row).
    """
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def twin_batches(sequences: Sequence[Tokens], tokens_per_batch: int) -> list[list[int]]:
    """As `length_sorted_batches`, with two answers to one prompt half a batch apart, where `prefix.py` computes their
    prompt once; sequences without a twin have batches of their own.
    """
    waiting: dict[tuple[int, ...], int] = {}
    twins: list[tuple[int, int]] = []
    for index, (prompt, _) in enumerate(sequences):
        if (other := waiting.pop(tuple(prompt), None)) is None:
            waiting[tuple(prompt)] = index
        else:
            twins.append((other, index))
    longer = [max((sequences[index] for index in pair), key=lambda tokens: len(tokens[1])) for pair in twins]
    pairs = [[twins[place] for place in batch] for batch in length_sorted_batches(longer, tokens_per_batch // 2)]
    alone = list(waiting.values())
    rest = length_sorted_batches([sequences[index] for index in alone], tokens_per_batch)
    return [[pair[side] for side in (0, 1) for pair in batch] for batch in pairs] + [
        [alone[place] for place in batch] for batch in rest
    ]


def batch_size_in_tokens(model: Any, tokens_per_batch: int = TOKENS_PER_BATCH) -> int:
    """`tokens_per_batch`, less where a large vocabulary would make the fp32 logits exceed half a GiB."""
    vocabulary = model.config.get_text_config().vocab_size
    return max(1, min(tokens_per_batch, LOGITS_BYTES // (4 * vocabulary)))


def completion_logits(model: Any, batch: Sequence[Tokens], pad_id: int) -> Tensor:
    """Logits that predict each completion token, rows one after the other: (tokens of all completions,
    vocabulary).

    Only these positions pass the LM head, in whatever way the model scales or caps its logits. A completion
    token without any token before it (empty prompt, no BOS) has no prediction and is left out, as in TRL.
    """
    ids, attention = pad_batch([[*prompt, *completion] for prompt, completion in batch], pad_id, model.device, "right")
    scored = torch.zeros_like(attention, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(batch):
        scored[row, max(0, len(prompt) - 1) : len(prompt) + len(completion) - 1] = True

    def keep_scored(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:, -scored.shape[1] :][scored.to(args[0].device)], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep_scored)
    try:
        return model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    finally:
        handle.remove()


def completion_targets(batch: Sequence[Tokens]) -> tuple[Tensor, list[int]]:
    """The tokens that `completion_logits` predicts, in its order, and how many belong to each row."""
    rows = [completion if prompt else completion[1:] for prompt, completion in batch]
    return torch.tensor([token for row in rows for token in row], dtype=torch.long), [len(row) for row in rows]


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target, fp32 log-softmax in chunks: (tokens, vocabulary), (tokens,) →
    (tokens,), nats.
    """
    parts = zip(logits.split(_CHUNK), targets.to(logits.device).split(_CHUNK), strict=True)
    return torch.cat([_log_softmax_at(rows, tokens) for rows, tokens in parts]).cpu()


def score(
    model: Any,
    sequences: Sequence[Tokens],
    *,
    pad_id: int,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    description: str | None = None,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """Summed completion log-probability of each sequence (EOS in), in nats: (sequences,), float64.

    Plain sums as in DPO's and KTO's loss; call inside `measuring`. With a `description` a terminal shows a bar.
    The processes of an `accelerator` take turns at the very batches that one would take, so that the values are the
    same; all of them must call this, and all get every value.
    """
    logps = torch.zeros(len(sequences), dtype=torch.float64)
    turns = take_turns(twin_batches(sequences, batch_size_in_tokens(model, tokens_per_batch)), accelerator)
    for indices, counts in tqdm(turns, description, disable=not (description and sys.stderr.isatty()), leave=False):
        batch = [sequences[index] for index in indices]
        targets, lengths = completion_targets(batch)
        terms = token_logps(completion_logits(model, batch, pad_id), targets).double()
        if counts:
            logps[indices] = torch.stack([part.sum() for part in terms.split(lengths)])
    return add_up(logps, accelerator)


def take_turns(batches: list[list[int]], accelerator: Accelerator | None) -> list[tuple[list[int], bool]]:
    """The batches of this process, of several that take turns; each with whether it counts.

    As many for each process, since their weights may be shared out: one that has nothing left repeats the last batch.
    """
    place, count = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    turns = [first + place for first in range(0, len(batches), count)]
    return [(batches[min(turn, len(batches) - 1)], turn < len(batches)) for turn in turns]


def add_up(values: Tensor, accelerator: Accelerator | None) -> Tensor:
    """Over all processes; exact where each value comes from one of them and is zero in the others."""
    if accelerator is None or accelerator.num_processes == 1:
        return values
    total: Any = accelerator.reduce(values.to(accelerator.device), "sum")
    return total.cpu()


def _log_softmax_at(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def fingerprint(values: Any) -> str:
    """Short hash of plain values, to tell whether kept reference values belong to the same inputs."""
    return sha256(json.dumps(values).encode()).hexdigest()[:16]


class Reference:
    """The model that drift is measured against: the one training started from, or another given on purpose.

    Where it comes from, in this order: `model`; a PEFT policy with its adapter off (or TRL's copy named
    "ref"); `trainer.ref_model`, unless TRL moves it (`sync_ref_model`); else the policy itself while it is
    untrained. In the last case (full tuning of ORPO, CPO, SimPO, or with precomputed reference log-probs) the
    reference is no longer there once training began: what is needed of it is cached at step 0, and `reload`
    (a function that loads the start model anew) serves the rare measurements that need the model itself.

    `is_start=False` says that `model` is, on purpose, not the start model: the step-0 identity is then not
    required. `state_dir` keeps the cached values, so that a resumed run measures against the same step 0.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        model: Any | None = None,
        reload: Callable[[], Any] | None = None,
        is_start: bool = True,
        state_dir: Path | None = None,
    ) -> None:
        self.trainer, self.is_start, self.state_dir = trainer, is_start, state_dir
        self._policy: Any = trainer.model
        self._reload = reload
        self._given = model is not None
        self._model = model if self._given else getattr(trainer, "ref_model", None)
        self._loaded: Any | None = None

    @property
    def live(self) -> bool:
        """Whether the reference can be run now, after training began."""
        moved = getattr(self.trainer.args, "sync_ref_model", False) and not self._given
        return self._loaded is not None or self._is_adapter or (self._model is not None and not moved)

    @property
    def can_load(self) -> bool:
        """Whether the reference can be run now or be loaded anew."""
        return self.live or self._reload is not None

    @property
    def is_policy(self) -> bool:
        """Whether the policy itself, untrained, is the only reference at hand."""
        return self._loaded is None and self._model is None and not self._is_adapter

    @contextmanager
    def loaded(self) -> Iterator[bool]:
        """For the length of the block the reference is live, loaded anew where it must be; yields whether it
        is.
        """
        if not self.live and self._reload is not None:
            self._loaded = self._reload().to(self._policy.device).eval()
        try:
            yield self.live
        finally:
            self._loaded = None

    @contextmanager
    def active(self) -> Iterator[Any]:
        """A model that answers as the reference does, to be used inside the block. At step 0, or while
        `live`.
        """
        model = self._loaded if self._loaded is not None else self._model
        if model is not None:
            yield model
        elif self._is_adapter:
            from trl.trainer.utils import use_adapter

            with use_adapter(self._policy, "ref" if "ref" in self._policy.peft_config else None):
                yield self._policy
        else:
            yield self._policy

    @contextmanager
    def required(self, step: int) -> Iterator[Any]:
        """The reference after the start, loaded anew where it must be; ModelError where it is gone."""
        with self.loaded() as live:
            if not live:
                raise ModelError(_LOST_REFERENCE.format(step=step, state_dir=self.state_dir))
            with self.active() as model:
                yield model

    @property
    def models(self) -> list[Any]:
        """The reference's own weights, where it has any beside the policy's."""
        return [each for each in (self._model, self._loaded) if each is not None]

    @property
    def _is_adapter(self) -> bool:
        return self._model is None and is_peft_model(self._policy)

    def save(self, name: str, values: dict[str, Any]) -> None:
        """Keep values in the state directory, replacing them in one step (main process only)."""
        if self.state_dir is None or not self.trainer.is_world_process_zero():
            return
        self.state_dir.mkdir(parents=True, exist_ok=True)
        partial = self.state_dir / f".{name}.partial"
        torch.save(values, partial)
        partial.replace(self.state_dir / f"{name}.pt")

    def load(self, name: str, fingerprint: str) -> dict[str, Any] | None:
        """Values kept under this name, or None where there are none with the same `fingerprint` entry."""
        path = self.state_dir / f"{name}.pt" if self.state_dir is not None else None
        if path is None or not path.exists():
            return None
        values: dict[str, Any] = torch.load(path, weights_only=True)
        return values if values["fingerprint"] == fingerprint else None

    def check_start(self, logratios: Tensor, tokens: Tensor) -> float:
        """The largest |policy − reference| in nats at step 0; ModelError where it shows another reference.

        Limits: 1e-3 nats a sequence in fp32, .01 nats a token otherwise (padding and rounding stay below).
        Shapes (sequences,) twice.
        """
        largest = float(logratios.abs().max())
        if self.is_start and not self.agrees(logratios, tokens):
            raise ModelError(_WRONG_REFERENCE.format(largest=largest, limit=self._limit_text))
        return largest

    def agrees(self, differences: Tensor, tokens: Tensor) -> bool:
        """Whether log-probabilities that differ by so many nats may come from the same model; shapes (sequences,)."""
        limit = torch.full_like(differences, 1e-3) if self._is_fp32 else 0.01 * tokens
        return bool((differences.abs() <= limit).all())

    @property
    def _is_fp32(self) -> bool:
        models = [self._policy, *self.models]
        plain = self.trainer.accelerator.mixed_precision == "no"
        return plain and all(p.dtype == torch.float32 for model in models for p in model.parameters())

    @property
    def _limit_text(self) -> str:
        return "1e-3 nats a sequence (fp32)" if self._is_fp32 else ".01 nats a token"


_LOST_REFERENCE = (
    "reference: measuring begins at step {step}, but the log-probabilities of step 0 are not in "
    "state_dir={state_dir} and the start model is gone; pass Reference(trainer, reload=...), a function that "
    "loads the start model"
)
_WRONG_REFERENCE = (
    "reference: at step 0 it must give the same log-probabilities as the policy, within {limit}, but they "
    "differ by up to {largest:.3g} nats, so drift and rewards would be measured from another model than the "
    "one training starts from. Usual causes: a policy edited, merged or resized in memory while the "
    "reference is loaded from its path (pass ref_model), an adapter that does not start at zero, NaN "
    "weights. If another reference is meant, say so: Reference(trainer, model=..., is_start=False)."
)
