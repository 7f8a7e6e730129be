"""How much a run measures: chosen once, from measured times, so that measuring takes no more than a share of the run.

Written to the manifest, so that a resumed run measures the same, and to the sweep's folder, so that its runs compare.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from transformers import TrainerCallback

from dpo_kit.config.settings import MOST, Settings
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json, write_json
from dpo_kit.run.processes import is_writer
from dpo_kit.trainer.arguments import describe_arguments

if TYPE_CHECKING:
    from dpo_kit.trainer.costs import Costs

log = logging.getLogger(__name__)
ALWAYS = 10.0  # seconds that measuring may take in any run
MARGIN = 0.8  # of what is allowed is planned with: times vary


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much a run measures: `evaluations` after the start, the last at the end, of so many held-out `pairs` (or
    unary rows), and KL on `prompts` with answers of at most `max_new_tokens`.
    """

    evaluations: int
    pairs: int
    prompts: int
    max_new_tokens: int


LEAST = (Amount(2, 32, 16, 32), Amount(2, 4, 4, 16))  # half-way and end; what is worth having, and what is possible


def choose_amount(
    most: Amount, costs: Costs, allowed: float, typed: Collection[str] = (), judged: bool = False
) -> Amount:
    """`most`, halved field by field, where that saves the most time, until measuring takes `allowed` seconds; what is
    `typed` stays. Never below the last of LEAST, or where answers are `judged`, which then stay whole, its first.
    """
    amount = most
    typed = {*typed, "max_new_tokens"} if judged else typed
    for least in LEAST[:1] if judged else LEAST:
        floor = {name: min(vars(most)[name], value) for name, value in vars(least).items()}
        while costs.measuring(amount) > allowed:
            smaller = [
                dataclasses.replace(amount, **{name: max(floor[name], math.ceil(value / 2))})
                for name, value in vars(amount).items()
                if name not in typed and value > floor[name]
            ]
            if not smaller:
                break
            amount = min(smaller, key=costs.measuring)
    return amount


class Budget(TrainerCallback):
    """Before anything is measured: how much will be. `probe` (PairProbe) and `drift` (KLDrift) are told, where there
    are any, and the trainer's cadence is set.

    `rows` are those of training; `began` is when the run did (`time.time()`), for what came before the first step.
    """

    probe: Any = None
    drift: Any = None

    def __init__(
        self, trainer: Any, settings: Settings, run: RunDirectory, rows: Sequence[dict[str, Any]], began: float
    ) -> None:
        self.trainer, self.settings, self.run, self.rows, self.began = trainer, settings, run, rows, began
        self.measuring_seconds = 0.0

    def carry(self) -> dict[str, Any]:
        return {"measuring_seconds": self.measuring_seconds}

    def pick_up(self, carried: dict[str, Any]) -> None:
        self.measuring_seconds += carried["measuring_seconds"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (chosen,) = broadcast_object_list([chosen_amount(self.run)])
        if chosen is None:
            with agreed_file() as file:
                (agreed,) = broadcast_object_list([read_json(file) if file and file.exists() else None])
                chosen = agreed or vars(self.choose(state.max_steps))
                if is_writer():
                    write_json(self.run.manifest, read_json(self.run.manifest) | {"measuring": chosen})
                    if file is not None:
                        write_json(file, chosen)
        self.apply(Amount(**chosen), state)

    def choose(self, steps: int) -> Amount:
        """What is measured in a run of so many steps; the same in all of its processes."""
        callbacks, args = self.settings.callbacks, self.trainer.args
        by_steps = args.eval_strategy == "steps"
        most = Amount(
            math.ceil(steps / args.eval_steps) if by_steps else max(1, round(args.num_train_epochs)),
            len(self.probe.rows) if self.probe else 0,
            len(self.drift.rows) if self.drift else 0,
            callbacks.at_most("max_new_tokens"),
        )
        budget, trl = callbacks.budget, self.settings.trl
        typed = {name for name in MOST if getattr(callbacks, name) is not None}
        # evaluations come when the user says, or when checkpoints do of which the best is kept
        if not by_steps or trl["eval_steps"] is not None or (trl["load_best_model_at_end"] and trl["save_steps"]):
            typed.add("evaluations")
        if budget is None or len(typed) == len(vars(most)) or not (self.probe or self.drift):
            return most
        started = time.time()
        costs = self.measure_costs()
        self.measuring_seconds += time.time() - started
        training = steps * costs.step
        allowed = max(ALWAYS, MARGIN * budget / (1 - budget) * (time.time() - self.began + training))
        log.info(
            f"training takes about {training:.0f} s, measuring all would take {costs.measuring(most):.0f} s, and may "
            f"take {allowed:.0f} s (callbacks.budget={budget:g})"
        )
        judged = bool(self.settings.data.gold or callbacks.sample_metrics)
        return broadcast_object_list([choose_amount(most, costs, allowed, typed, judged)])[0]

    def apply(self, amount: Amount, state: Any) -> None:
        """Set probe, drift and cadence to `amount`, and say so."""
        args, measured = self.trainer.args, []
        by_steps = args.eval_strategy == "steps"
        if by_steps and amount.evaluations < math.ceil(state.max_steps / args.eval_steps):
            args.eval_steps = state.eval_steps = math.ceil(state.max_steps / amount.evaluations)
            if args.load_best_model_at_end and self.settings.trl["save_steps"] is None:
                args.save_steps = state.save_steps = args.eval_steps
            if is_writer():
                write_json(self.run.trl_config, describe_arguments(args))
        if self.probe:
            self.probe.take(amount.pairs)
            measured.append(f"on {len(self.probe.rows)} held-out rows")
        if self.drift:
            self.drift.take(amount.prompts, amount.max_new_tokens)
            measured.append(f"KL on {len(self.drift.rows)} prompts, answers of up to {amount.max_new_tokens} tokens")
        every = "step" if args.eval_steps == 1 else f"{args.eval_steps or 0:g} steps"
        cadence = {"steps": f", every {every}", "epoch": ", every epoch"}.get(args.eval_strategy, "")
        if measured:
            log.info("measured at the start%s and at the end: %s", cadence, "; ".join(measured))

    def measure_costs(self) -> Costs:
        """Times of this model on this machine, from a few rows that are scored and a few answers that are drawn."""
        from dpo_kit.trainer.costs import measure_costs

        return measure_costs(self.trainer, self.settings, self.probe, self.drift, self.rows)


@contextlib.contextmanager
def agreed_file() -> Iterator[Path | None]:
    """The file in which the runs of a sweep agree, while no other one chooses; None outside a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        yield None
        return
    folder = Path(HydraConfig.get().sweep.dir)
    with FileLock(folder / ".measuring.lock") if is_writer() else contextlib.nullcontext():
        yield folder / "measuring.json"


def chosen_amount(run: RunDirectory) -> dict[str, int] | None:
    """What an earlier start of `run` has chosen to measure; None where there was none."""
    return read_json(run.manifest).get("measuring") if run.manifest.exists() else None


def spent(trainer: Any) -> float:
    """Seconds that measuring has taken in a run, over all its starts; TRL's own evaluations among it."""
    own = (getattr(callback, "measuring_seconds", 0.0) for callback in trainer.callback_handler.callbacks)
    return sum(own) + sum(row.get("eval_runtime", 0.0) for row in trainer.state.log_history)
