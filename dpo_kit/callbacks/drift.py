"""KL between policy and reference along samples of either; the reference's samples are kept from step 0."""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import LogitsProcessor

from dpo_kit.callbacks.metrics import bootstrap_se, rao_blackwell
from dpo_kit.callbacks.reference import Reference, fingerprint
from dpo_kit.model.batches import pad_token_id
from dpo_kit.model.chats import prompt_of
from dpo_kit.model.head import Head, Tokens, read_head
from dpo_kit.model.predicted import Mixed, Predicted, completion_targets, jittered, predict, token_logps
from dpo_kit.model.sampling import Sample, draw_samples
from dpo_kit.model.scoring import add_up, batch_size_in_tokens, length_sorted_batches, take_turns
from dpo_kit.model.tokens import encode_prompts
from dpo_kit.model.turns import stop_ids

ESTIMATORS = ("rb", "k1")
FLOOR_SAMPLES = 16  # along which the reference is compared with itself to see what rounding does


@dataclass(frozen=True)
class Divergence:
    """KL per sample, (samples,) in nats: Rao-Blackwellized (None where unaffordable) and k1."""

    rb: Tensor | None
    k1: Tensor


@dataclass(frozen=True)
class ReferenceSamples:
    """Samples drawn from the reference once, with what it says along them.

    `logps`: per sample the log-probability of each completion token (nats). `states`: by sample what it predicts at
    each of them, as `Predicted` has it, with `head`, which makes logits of them; or None where they exceed the cache;
    of several processes each has those of its own batches. `floor_nats`: the KL per answer that rounding alone makes of
    it, 0 in fp32.
    """

    samples: list[Sample]
    logps: list[Tensor]
    states: dict[int, Tensor] | None
    head: Head | None = None
    floor_nats: float = 0.0

    def predicted(self, indices: list[int], device: Any) -> Predicted:
        """What the reference predicts along some of the samples."""
        assert self.states is not None
        states = torch.cat([self.states[index] for index in indices]).to(device)
        return Predicted(states, self.head.to(device) if self.head else None)


class Drift:
    """Draws samples of policy and reference and measures KL along them. Its methods run inside `measuring`.

    `rows` hold the prompts; `cache_bytes` bounds what is kept of the reference's predictions. `shared` is a folder that
    runs from this very reference have in common: its samples are drawn once for all of them. Several processes share
    the work and reach the numbers of one; all of them must call its methods.
    """

    def __init__(
        self,
        reference: Reference,
        rows: list[dict[str, Any]],
        *,
        max_new_tokens: int = 64,
        batch_size: int | None = None,
        cache_bytes: int = 2**30,
        tokens_per_batch: int | None = None,
        seed: int = 0,
        shared: Path | None = None,
    ) -> None:
        self.reference, self.rows, self.seed, self.shared = reference, rows, seed, shared
        self.cache_bytes, self.tokens_per_batch = cache_bytes, tokens_per_batch
        self._draw_options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        trainer: Any = reference.trainer
        self.policy, self._tokenizer, self._accelerator = trainer.model, trainer.processing_class, trainer.accelerator
        self._pad_id = pad_token_id(self._tokenizer)

    def take(self, count: int, max_new_tokens: int) -> None:
        """Draw answers to the first `count` rows only, of at most so many tokens; before anything is drawn."""
        self.rows = self.rows[:count]
        self._draw_options["max_new_tokens"] = max_new_tokens

    def draw(self, model: Any, processor: Callable[[Tensor], LogitsProcessor] | None = None) -> list[Sample]:
        """One sample per row, with the same seed each time, so that neighbouring models are compared on like draws."""
        torch.manual_seed(self.seed)
        shared_out = {"processor": processor, "accelerator": self._accelerator}
        return draw_samples(model, self._tokenizer, self.rows, **shared_out, **self._draw_options)

    def prepare(self, step: int) -> ReferenceSamples:
        """The reference's samples: drawn and recorded at step 0, read back or made again after a resume.

        ModelError where neither can be done.
        """
        saved = self._read_back() if step > 0 else None
        if saved is not None and (saved.states is not None or not self.reference.can_load):
            return saved
        with self.reference.active() if step == 0 else self.reference.required(step) as model:
            prepared = self._record(model, saved.samples if saved else self._reference_samples(model))
        if step == 0:
            states, head = None, None
            if prepared.states is not None and not self.reference.can_load:  # large: only where no model gives it again
                states = dict(gather_object(list(prepared.states.items())))
                head = prepared.head and vars(prepared.head)
            values = {"samples": _plain(prepared.samples), "logps": prepared.logps, "states": states, "head": head}
            known_by = {"fingerprint": self._fingerprint}
            self.reference.save("samples", known_by | values | {"floor_nats": prepared.floor_nats})
        return prepared

    def forward(self, prepared: ReferenceSamples) -> Divergence:
        """KL(reference‖policy) on the reference's samples: k1 alone without both its states and a live reference."""
        return self._compare(prepared.samples, prepared)

    def reverse(self, samples: list[Sample], share: float = 1.0) -> Divergence:
        """KL(policy‖reference) on samples of the policy; the reference must be live, or the step 0.

        With a `share` below 1 the policy is the mix (1 − share)·reference + share·policy of the logits.
        """
        return self._compare(samples, None, share)

    def _record(self, model: Any, samples: list[Sample]) -> ReferenceSamples:
        head, copied = read_head(model), 0
        if head and not self.reference.live:
            head, copied = head.copy(), head.weight.nbytes  # training will move it
        width = head.weight.shape[1] if head else model.config.get_text_config().vocab_size
        fits = 4 * width * sum(len(sample.token_ids) for sample in samples) + copied <= self.cache_bytes
        own: list[tuple[int, Tensor]] = []
        states: dict[int, Tensor] = {}
        for indices, batch, counts in self._batches(samples):
            predicted = predict(model, batch, self._pad_id)
            targets, lengths = completion_targets(batch)
            if counts:
                own += zip(indices, token_logps(predicted, targets).split(lengths), strict=True)
            if fits:
                states.update(zip(indices, predicted.states.cpu().split(lengths), strict=True))
        logps, floor = dict(gather_object(own)), 0.0
        # KL per answer between what it predicts and what it predicts rounded otherwise
        if not self.reference.is_fp32():
            some = [(each.prompt_ids, each.token_ids) for each in samples[:FLOOR_SAMPLES]]
            predicted = predict(model, some, self._pad_id)
            with jittered(model):
                again = predict(model, some, self._pad_id)
            floor = float(kl_terms(predicted, again, completion_targets(some)[0])["rb"].sum()) / len(some)
        in_order = [logps[index] for index in range(len(samples))]
        return ReferenceSamples(samples, in_order, states if fits else None, head, floor)

    def _compare(self, samples: list[Sample], prepared: ReferenceSamples | None, share: float = 1.0) -> Divergence:
        """Forward, on the reference's samples, where they are `prepared`; else reverse."""
        kept = prepared is not None and prepared.states is not None
        only_k1 = prepared is not None and not kept and not self.reference.live
        sums = torch.zeros(len(ESTIMATORS), len(samples), dtype=torch.float64)
        for indices, batch, counts in self._batches(samples):
            targets, lengths = completion_targets(batch)
            policy: Any = predict(self.policy, batch, self._pad_id)
            if prepared is not None and only_k1:
                terms = {"k1": torch.cat([prepared.logps[i] for i in indices]) - token_logps(policy, targets)}
            else:
                if prepared is not None and kept:
                    reference = prepared.predicted(indices, self.policy.device)
                else:
                    with self.reference.active() as model:
                        reference = predict(model, batch, self._pad_id)
                policy = policy if share == 1 else Mixed(reference, policy, share)
                p, q = (policy, reference) if prepared is None else (reference, policy)
                terms = kl_terms(p, q, targets)
            for name, values in terms.items() if counts else ():
                totals = [part.sum() for part in values.double().split(lengths)]
                sums[ESTIMATORS.index(name), indices] = torch.stack(totals)
        rb, k1 = add_up(sums, self._accelerator)
        return Divergence(None if only_k1 else rb, k1)

    def _batches(self, samples: list[Sample]) -> Iterator[tuple[list[int], list[Tokens], bool]]:
        """The batches of this process: indices, sequences, and whether they count (`take_turns`)."""
        sequences = [(sample.prompt_ids, sample.token_ids) for sample in samples]
        self.tokens_per_batch = self.tokens_per_batch or batch_size_in_tokens(self.policy)
        batches = length_sorted_batches(sequences, self.tokens_per_batch)
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

    def _read_back(self) -> ReferenceSamples | None:
        if (saved := self.reference.load("samples", self._fingerprint)) is None:
            return None
        head = Head(**saved["head"]) if saved["head"] else None
        samples = _with_rows(self.rows, saved["samples"])
        return ReferenceSamples(samples, saved["logps"], saved["states"], head, saved["floor_nats"])


def _plain(samples: list[Sample]) -> list[dict[str, Any]]:
    return [{name: value for name, value in asdict(each).items() if name != "row"} for each in samples]


def _with_rows(rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> list[Sample]:
    return [Sample(row=row, **drawn) for row, drawn in zip(rows, plain, strict=True)]


def kl_terms(p: Predicted | Mixed, q: Predicted | Mixed, targets: Tensor) -> dict[str, Tensor]:
    """Terms of KL(p‖q) token by token: `rb` over the vocabulary, in tiles on the device, and `k1` at the sampled one.

    targets (tokens,); (tokens,) each, in nats, fp32, on the CPU.
    """
    parts: list[Tensor] = []
    for rows in p.tiles():
        logp, logq = (model.logits(rows).log_softmax(-1) for model in (p, q))
        at = targets[rows].to(logp.device)[:, None]
        parts.append(torch.stack([rao_blackwell(logp, logq), (logp.gather(-1, at) - logq.gather(-1, at))[:, 0]]))
    rb, k1 = torch.cat(parts, 1).cpu()
    return {"rb": rb, "k1": k1}


def drift_metrics(direction: str, divergence: Divergence, samples: list[Sample]) -> dict[str, float]:
    """Metrics of one direction ("forward", "reverse"): nats per response, standard error (bootstrap over
    prompts), nats per token, share of samples cut at the token limit. k1 stands beside rb as a check, or
    alone."""
    prompts = [sample.row["prompt_id"] for sample in samples]
    estimates = {f"probe/kl_{direction}_{name}_nats": kl for name, kl in vars(divergence).items() if kl is not None}
    values: dict[str, float] = {}
    for name, kl in estimates.items():
        values |= {name: float(kl.mean()), f"{name}_se": bootstrap_se(kl, prompts)}
    name, kl = next(iter(estimates.items()))
    values[f"{name}_per_token"] = float(kl.sum()) / sum(len(sample.token_ids) for sample in samples)
    values[f"{name}_cut_share"] = sum(sample.cut for sample in samples) / len(samples)
    return values
