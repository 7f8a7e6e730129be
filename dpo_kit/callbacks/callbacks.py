"""Callbacks that measure preference tuning in any TRL trainer, the same way for every method.

    probe = PairProbe(trainer, held_out_rows, beta=trainer.args.beta, saturation="dpo")
    trainer.add_callback(PreferenceMargin(probe))
    trainer.add_callback(ImplicitReward(probe))
    trainer.add_callback(KLDrift(trainer, held_out_rows, reference=probe.reference))

They measure at step 0, at each evaluation and at the end, against the model that training started from.
Values go through `transformers.Trainer.log` under "probe/...", so to `state.log_history` and to every
reporter, and as "eval_probe/..." into an evaluation's metrics, so `metric_for_best_model="probe/accuracy"`
works with every method. They change nothing in training: no gradients, a forked random state, modes restored.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed

from dpo_kit.callbacks.drift import Divergence, Drift, ReferenceSamples, drift_metrics
from dpo_kit.callbacks.probe import PairProbe, name_rows
from dpo_kit.callbacks.reference import Reference
from dpo_kit.callbacks.scores import preference_metrics, reward_metrics
from dpo_kit.config.extensions import call_metrics
from dpo_kit.model.batches import measuring, random_states, set_random_states
from dpo_kit.model.sampling import Sample
from dpo_kit.run.quiet import phase

logger = logging.getLogger(__name__)
Metrics = dict[str, float]


class _Measuring(TrainerCallback):
    """When to measure: at the start, at each evaluation, at the end unless the last evaluation just did."""

    measured = "held-out rows"

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.measuring_seconds = 0.0  # over all starts of a run
        self._logged: tuple[int, bool] | None = None
        self._metrics: Metrics = {}

    def measure(self, moment: str, *, kept: bool) -> Metrics:
        """Metrics at the trainer's present step; `moment` is "start", "evaluation" or "end"."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Find the reference's side again after a resume; ModelError where it is gone."""
        raise NotImplementedError

    def carry(self) -> dict[str, Any]:
        """What a resumed run must know (see trainer/resume/carried_state.py); `pick_up` takes it back."""
        return {"logged": self._logged, "measuring_seconds": self.measuring_seconds}

    def pick_up(self, carried: dict[str, Any]) -> None:
        """Take back what `carry` gave."""
        self._logged = carried["logged"]
        self.measuring_seconds += carried["measuring_seconds"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            with phase(f"first measurement: {self.measured}"):
                self._report("start", 0)
        else:
            with self._timed():
                self.prepare()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Metrics | None = None, **_: Any) -> None:
        values = self._report("evaluation", state.global_step)
        if metrics is not None:
            metrics.update({f"eval_{key}": value for key, value in values.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        with phase(f"last measurement: {self.measured}"):
            self._report("end", state.global_step, kept=bool(best) and state.best_global_step != state.global_step)

    def _report(self, moment: str, step: int, kept: bool = False) -> Metrics:
        if self._logged != (step, kept) or moment == "start":
            with self._timed():
                self._metrics = self.measure(moment, kept=kept)
            # The base class's method: TRL's own would also flush, and so cut short, its averages of training metrics
            Trainer.log(self.trainer, dict(self._metrics))
            self._logged = (step, kept)
        return self._metrics

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.measuring_seconds += time.monotonic() - started


class _OfProbe(_Measuring):
    """A measure of the probe's scores."""

    def __init__(self, probe: PairProbe) -> None:
        super().__init__(probe.trainer)
        self.probe = probe

    def prepare(self) -> None:
        self.probe.prepare()


class PreferenceMargin(_OfProbe):
    """How well the implicit reward ranks held-out pairs: margin, accuracy, saturation, the part length plays.

    Logs `preference_metrics` of the probe's scores. Unary rows have no pairs: AUC and class gap instead.
    """

    def measure(self, moment: str, *, kept: bool) -> Metrics:
        scores = self.probe.scores(kept=kept)
        values = preference_metrics(scores, self.probe.beta, self.probe.saturation)
        if not self.probe.reference.is_start and scores.step == 0:
            values["probe/reference_offset_nats"] = self.probe.reference_offset_nats
        return values


class ImplicitReward(_OfProbe):
    """Implicit reward (beta · logratio) of chosen and rejected, their logratios in nats, and their displacement.

    Logs `reward_metrics` of the probe's scores. Without a beta that is a distance to the reference (ORPO, CPO, SimPO)
    there are logratios only.
    """

    def measure(self, moment: str, *, kept: bool) -> Metrics:
        return reward_metrics(self.probe.scores(kept=kept), self.probe.beta)


class OwnMetrics(_OfProbe):
    """Measures of the user's own on held-out rows: each function of `paths` ({name: module.function}) is called as
    `function(rows, scores)`, returns a number and is logged as custom/<name>.

    `rows` are the probe's rows as dicts, `scores` is a `dpo_kit.callbacks.scores.Scores`; what it draws comes from a
    forked random state seeded with the step.
    """

    def __init__(self, probe: PairProbe, paths: dict[str, str]) -> None:
        super().__init__(probe)
        self.paths = paths

    def measure(self, moment: str, *, kept: bool) -> Metrics:
        scores = self.probe.scores(kept=kept)
        with forked_random(scores.step):
            return call_metrics(self.paths, self.probe.rows, scores)


@contextmanager
def forked_random(seed: int) -> Iterator[None]:
    """Inside, every generator that training draws from is seeded with `seed`; after, each is as it was before."""
    states = random_states()
    set_seed(seed)
    try:
        yield
    finally:
        set_random_states(states)


class KLDrift(_Measuring):
    """KL between policy and reference in nats per response, forward and reverse, on samples at temperature 1.

    Forward, KL(reference‖policy), at every measurement, on samples of the reference drawn once. Reverse,
    KL(policy‖reference), on fresh samples of the policy: at step 0 and at `moments` (2) more, spread evenly up to the
    end, each at the evaluation that is nearest. Both Rao-Blackwellized (arXiv:2504.10637), with k1 beside as a check,
    standard errors by bootstrap over prompts, per token, and the share of samples cut at the token limit (which makes
    the value a lower bound).

    `options` are those of `Drift`: `max_new_tokens` (64) of an answer, `seed` (0), `batch_size`, `tokens_per_batch`,
    `cache_bytes` (1 GiB) and `shared`. What the reference predicts along its samples (hidden states, and its LM head)
    is kept up to `cache_bytes`; beyond, where it cannot be run beside the policy, evaluations log k1 alone and
    `Reference(reload=...)` serves the moments at which the policy is sampled.

    Each of `on_samples` is called as `hook(step, samples)` with the fresh policy samples; what it returns is logged.
    """

    measured = "answers for the KL"

    def __init__(
        self,
        trainer: Trainer,
        prompts: Sequence[dict[str, Any]],
        *,
        reference: Reference | None = None,
        samples_per_prompt: int = 1,
        moments: int = 2,
        on_samples: Sequence[Callable[[int, list[Sample]], Metrics]] = (),
        **options: Any,
    ) -> None:
        super().__init__(trainer)
        self.reference = reference or Reference(trainer)
        distinct = {row["prompt_id"]: row for row in name_rows(prompts)}
        rows = [row for row in distinct.values() for _ in range(samples_per_prompt)]
        self.drift = Drift(self.reference, rows, **options)
        self.on_samples, self.samples_per_prompt, self.moments = list(on_samples), samples_per_prompt, moments
        self._prepared: ReferenceSamples | None = None
        self._forward_at: tuple[int, bool, bool] | None = None
        self._forward_metrics: Metrics = {}
        self._divergence: Divergence | None = None  # forward, as last measured
        self._previous_step, self._moments_done = 0, 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The prompts that are answered, a row for each answer."""
        return self.drift.rows

    def take(self, prompts: int, max_new_tokens: int, moments: int) -> None:
        """Answer only the first `prompts`, in at most so many tokens, at so many moments; before anything is drawn."""
        self.moments = moments
        self.drift.take(prompts * self.samples_per_prompt, max_new_tokens)

    def prepare(self) -> None:
        if self._prepared is None:
            with measuring(self.trainer, *self.reference.models):
                self._prepared = self.drift.prepare(self.trainer.state.global_step)

    def measure(self, moment: str, *, kept: bool) -> Metrics:
        step = self.trainer.state.global_step
        full = moment != "evaluation" or self._is_a_moment(step)
        self.prepare()
        with measuring(self.trainer, *self.reference.models):
            if not full:
                return self._forward(step, kept)
            with self.reference.loaded():
                return {**self._forward(step, kept), **self._reverse(step)}

    def carry(self) -> dict[str, Any]:
        return super().carry() | {"previous_step": self._previous_step, "moments_done": self._moments_done}

    def pick_up(self, carried: dict[str, Any]) -> None:
        super().pick_up(carried)
        self._previous_step = carried["previous_step"]
        self._moments_done = carried.get("moments_done", int(carried.get("half_way_done", False)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forward_at = None
        self._previous_step = state.global_step
        self._moments_done = sum(moment < state.global_step for moment in self._between(state.max_steps))
        super().on_train_begin(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._logged = None  # the last evaluation measured the forward direction only, which is not measured again
        super().on_train_end(args, state, control, **kwargs)

    def _forward(self, step: int, kept: bool) -> Metrics:
        assert self._prepared is not None
        moment = (step, kept, self._prepared.states is not None or self.reference.live)
        if self._forward_at != moment:
            divergence = self._divergence = self.drift.forward(self._prepared)
            if step == 0:
                self._check_start(divergence, self._prepared.samples)
            self._forward_metrics = drift_metrics("forward", divergence, self._prepared.samples)
            if self._prepared.floor_nats:
                self._forward_metrics["probe/kl_floor_nats"] = self._prepared.floor_nats
            self._forward_at = moment
        return self._forward_metrics

    def _reverse(self, step: int) -> Metrics:
        assert self._prepared is not None
        untrained = step == 0 and self.reference.is_start  # the policy still is the reference, and its samples
        samples = self._prepared.samples if untrained else self.drift.draw(self.trainer.model)
        values: Metrics = {"probe/sample_tokens": sum(len(each.token_ids) for each in samples) / len(samples)}
        if self.reference.live or step == 0:
            forward = self._divergence
            if untrained and forward and forward.rb is not None and not self.reference.reloaded:
                divergence = Divergence(forward.rb, -forward.k1)  # the same answers under the same models
            else:
                divergence = self.drift.reverse(samples)
                if step == 0:
                    self._check_start(divergence, samples)
            values |= drift_metrics("reverse", divergence, samples)
        else:
            logger.warning("reverse KL is not measured: the start model is gone; pass Reference(trainer, reload=...)")
        for hook in self.on_samples:
            values |= hook(step, samples)
        return values

    def _check_start(self, divergence: Divergence, samples: list[Sample]) -> None:
        self.reference.check_start(divergence.k1, torch.tensor([len(each.token_ids) for each in samples]))

    def _between(self, steps: int) -> list[float]:
        """The moments between start and end, in steps."""
        return [number * steps / self.moments for number in range(1, self.moments)]

    def _is_a_moment(self, step: int) -> bool:
        """Whether this evaluation is the one nearest to a moment (the next is taken to be as far again)."""
        steps, interval = self.trainer.state.max_steps, step - self._previous_step
        if interval <= 0 or step >= steps:
            return False
        self._previous_step, done = step, self._moments_done
        for moment in self._between(steps)[done:]:
            if abs(step - moment) > abs(step + interval - moment):
                break
            self._moments_done += 1
        return self._moments_done > done


class Patience(EarlyStoppingCallback):
    """Stops training after `early_stopping_patience` evaluations without a better `metric_for_best_model`.

    A resumed run goes on counting. To be added after the callbacks that measure what it waits for.
    """

    def carry(self) -> dict[str, Any]:
        return {"waited": self.early_stopping_patience_counter}

    def pick_up(self, carried: dict[str, Any]) -> None:
        self.early_stopping_patience_counter = carried["waited"]
