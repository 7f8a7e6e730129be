"""KL between policy and reference along samples of either; the reference's samples are kept from step 0."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import LogitsProcessor

from dpo_kit.chats import prompt_of
from dpo_kit.metrics import bootstrap_se, rao_blackwell
from dpo_kit.sampling import Sample, draw_samples, pad_token_id
from dpo_kit.scoring import (
    TOKENS_PER_BATCH,
    Reference,
    Tokens,
    add_up,
    batch_size_in_tokens,
    completion_logits,
    completion_targets,
    fingerprint,
    length_sorted_batches,
    take_turns,
    token_logps,
)
from dpo_kit.tokens import encode_prompts
from dpo_kit.turns import stop_ids

logger = logging.getLogger(__name__)
ESTIMATORS = ("rb", "k1")
_CHUNK = 1024  # positions whose fp32 log-probabilities under both models are held at once


@dataclass(frozen=True)
class Divergence:
    """KL per sample, (samples,) in nats: Rao-Blackwellized (None where unaffordable) and k1."""

    rb: Tensor | None
    k1: Tensor


@dataclass(frozen=True)
class ReferenceSamples:
    """Samples drawn from the reference once, with what it says along them.

    `logps`: per sample the log-probability of each completion token (nats). `rows`: by sample the logits
    over the whole vocabulary at each of them, or None where they exceed the cache; of several processes each has those
    of its own batches.
    """

    samples: list[Sample]
    logps: list[Tensor]
    rows: dict[int, Tensor] | None


class Drift:
    """Draws samples of policy and reference and measures KL along them. Its methods run inside `measuring`.

    `rows` hold the prompts; `cache_bytes` bounds the reference's full-vocabulary rows. `shared` is a folder that runs
    from this very reference have in common: its samples are drawn once for all of them. Several processes share the
    work and reach the numbers of one; all of them must call its methods.
    """

    def __init__(
        self,
        reference: Reference,
        rows: list[dict[str, Any]],
        *,
        max_new_tokens: int,
        batch_size: int,
        cache_bytes: int,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        seed: int = 0,
        shared: Path | None = None,
    ) -> None:
        self.reference, self.rows, self.seed, self.shared = reference, rows, seed, shared
        self.cache_bytes, self.tokens_per_batch = cache_bytes, tokens_per_batch
        self._draw_options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        self.policy: Any = reference.trainer.model
        self._tokenizer: Any = reference.trainer.processing_class
        self._accelerator: Any = reference.trainer.accelerator

    def draw(self, model: Any, processor: Callable[[Tensor], LogitsProcessor] | None = None) -> list[Sample]:
        """One sample per row, with the same seed each time, so that neighbouring models are compared on like
        draws.
        """
        torch.manual_seed(self.seed)
        shared_out = {"processor": processor, "accelerator": self._accelerator}
        return draw_samples(model, self._tokenizer, self.rows, **shared_out, **self._draw_options)

    def prepare(self, step: int) -> ReferenceSamples:
        """The reference's samples: drawn and recorded at step 0, read back or made again after a resume.

        ModelError where neither can be done.
        """
        saved = self._read_back() if step > 0 else None
        if saved is not None and (saved.rows is not None or not self.reference.can_load):
            return saved
        source = self.reference.active() if step == 0 else self.reference.required(step)
        with source as model:
            prepared = self._record(model, saved.samples if saved else self._reference_samples(model))
        if step == 0:
            self._keep(prepared)
        return prepared

    def forward(self, prepared: ReferenceSamples) -> Divergence:
        """KL(reference‖policy) on the reference's samples: k1 alone where neither rows nor a live reference
        are there.
        """
        return self._compare(prepared.samples, prepared, forward=True)

    def reverse(self, samples: list[Sample], share: float = 1.0) -> Divergence:
        """KL(policy‖reference) on samples of the policy; the reference must be live, or the step 0.

        With a `share` below 1 the policy is the mix (1 − share)·reference + share·policy of the logits.
        """
        return self._compare(samples, None, forward=False, share=share)

    def _record(self, model: Any, samples: list[Sample]) -> ReferenceSamples:
        positions = sum(len(sample.token_ids) for sample in samples)
        fits = 4 * positions * model.config.get_text_config().vocab_size <= self.cache_bytes
        own: list[tuple[int, Tensor]] = []
        rows: dict[int, Tensor] = {}
        for indices, batch, counts in self._batches(samples):
            logits = completion_logits(model, batch, pad_token_id(self._tokenizer))
            targets, lengths = completion_targets(batch)
            if counts:
                own += zip(indices, token_logps(logits, targets).split(lengths), strict=True)
            if fits:
                rows.update(zip(indices, logits.cpu().split(lengths), strict=True))
        logps = dict(gather_object(own))
        return ReferenceSamples(samples, [logps[index] for index in range(len(samples))], rows if fits else None)

    def _compare(
        self, samples: list[Sample], prepared: ReferenceSamples | None, *, forward: bool, share: float = 1.0
    ) -> Divergence:
        only_k1 = prepared is not None and prepared.rows is None and not self.reference.live
        sums = torch.zeros(len(ESTIMATORS), len(samples), dtype=torch.float64)
        for indices, batch, counts in self._batches(samples):
            targets, lengths = completion_targets(batch)
            policy = completion_logits(self.policy, batch, pad_token_id(self._tokenizer))
            if prepared is not None and only_k1:
                terms = {"k1": torch.cat([prepared.logps[i] for i in indices]) - token_logps(policy, targets)}
            else:
                reference = self._reference_logits(indices, batch, prepared).to(policy.device)
                policy = policy if share == 1 else torch.lerp(reference.to(policy), policy, share)
                terms = kl_terms(reference, policy, targets) if forward else kl_terms(policy, reference, targets)
            for name, values in terms.items() if counts else ():
                sums[ESTIMATORS.index(name), indices] = torch.stack(
                    [part.sum() for part in values.double().split(lengths)]
                )
        rb, k1 = add_up(sums, self._accelerator)
        return Divergence(None if only_k1 else rb, k1)

    def _reference_logits(self, indices: list[int], batch: list[Tokens], prepared: ReferenceSamples | None) -> Tensor:
        if prepared is not None and prepared.rows is not None:
            return torch.cat([prepared.rows[index] for index in indices])
        with self.reference.active() as model:
            return completion_logits(model, batch, pad_token_id(self._tokenizer))

    def _batches(self, samples: list[Sample]) -> Iterator[tuple[list[int], list[Tokens], bool]]:
        """The batches of this process: indices, sequences, and whether they count (`take_turns`)."""
        sequences = [(sample.prompt_ids, sample.token_ids) for sample in samples]
        batches = length_sorted_batches(sequences, batch_size_in_tokens(self.policy, self.tokens_per_batch))
        for indices, counts in take_turns(batches, self._accelerator):
            yield indices, [sequences[index] for index in indices], counts

    def _reference_samples(self, model: Any) -> list[Sample]:
        if self.shared is None:
            return self.draw(model)
        ids = encode_prompts(self._tokenizer, [prompt_of(row) for row in self.rows])
        known_by = [ids, stop_ids(self._tokenizer, model), self._draw_options, self.seed]
        file = self.shared / f"samples-{fingerprint(known_by)}.pt"
        if all(gather_object([file.exists()])):
            return _with_rows(self.rows, torch.load(file, weights_only=True))
        drawn = self.draw(model)
        if self._accelerator.is_main_process:
            partial = file.with_suffix(f".{os.getpid()}")
            torch.save(_plain(drawn), partial)
            partial.replace(file)
        return drawn

    @property
    def _fingerprint(self) -> str:
        return fingerprint([[prompt_of(row) for row in self.rows], self._draw_options, self.seed])

    def _keep(self, prepared: ReferenceSamples) -> None:
        drawn = _plain(prepared.samples)
        rows = None  # they are large: kept only where no model could give them again
        if prepared.rows is not None and not self.reference.can_load:
            rows = dict(gather_object(list(prepared.rows.items())))
        values = {"fingerprint": self._fingerprint, "samples": drawn, "logps": prepared.logps, "rows": rows}
        self.reference.save("samples", values)

    def _read_back(self) -> ReferenceSamples | None:
        saved = self.reference.load("samples", self._fingerprint)
        if saved is None:
            return None
        return ReferenceSamples(_with_rows(self.rows, saved["samples"]), saved["logps"], saved["rows"])


def _plain(samples: list[Sample]) -> list[dict[str, Any]]:
    return [{name: value for name, value in asdict(each).items() if name != "row"} for each in samples]


def _with_rows(rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> list[Sample]:
    return [Sample(row=row, **drawn) for row, drawn in zip(rows, plain, strict=True)]


def kl_terms(p_logits: Tensor, q_logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Terms of KL(p‖q) position by position, `rb` and `k1` at the sampled token, fp32 in chunks, on the CPU.

    Shapes (tokens, vocabulary) twice, (tokens,) → (tokens,) each, in nats.
    """
    parts: dict[str, list[Tensor]] = {"rb": [], "k1": []}
    chunks = zip(p_logits.split(_CHUNK), q_logits.split(_CHUNK), targets.split(_CHUNK), strict=True)
    for p_chunk, q_chunk, tokens in chunks:
        logp, logq = (chunk.to(p_logits.device, torch.float32).log_softmax(-1) for chunk in (p_chunk, q_chunk))
        at = tokens.to(p_logits.device)[:, None]
        parts["rb"].append(rao_blackwell(logp, logq).cpu())
        parts["k1"].append((logp.gather(-1, at) - logq.gather(-1, at))[:, 0].cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def drift_metrics(direction: str, divergence: Divergence, samples: list[Sample]) -> dict[str, float]:
    """Metrics of one direction ("forward", "reverse"): nats per response, standard error (bootstrap over
    prompts), nats per token, share of samples cut at the token limit. k1 stands beside rb as a check, or
    alone."""
    prompts = [sample.row["prompt_id"] for sample in samples]
    tokens = sum(len(sample.token_ids) for sample in samples)
    estimates = {"rb": divergence.rb, "k1": divergence.k1}
    main = "k1" if divergence.rb is None else "rb"
    values: dict[str, float] = {}
    for estimator, kl in estimates.items():
        if kl is not None:
            name = f"probe/kl_{direction}_{estimator}_nats"
            values |= {name: float(kl.mean()), f"{name}_se": bootstrap_se(kl, prompts)}
    name, kl = f"probe/kl_{direction}_{main}_nats", estimates[main]
    values[f"{name}_per_token"] = float(kl.sum()) / tokens if kl is not None else float("nan")
    values[f"{name}_cut_share"] = sum(sample.cut for sample in samples) / len(samples)
    return values
