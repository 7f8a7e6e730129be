"""How much a run measures: chosen once, from times that are tried on a few rows here, so that measuring takes no more
than a share of the run. Loaded where anything is measured.

Written to the manifest, so that a resumed run measures the same, and to the sweep's folder, so that its runs compare.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import mean
from typing import Any

from accelerate.utils import broadcast_object_list
from filelock import FileLock
from transformers import TrainerCallback

from dpo_kit.callbacks.gold import load_gold
from dpo_kit.config.settings import MOST, Settings
from dpo_kit.data.other_rows import with_answer_lengths
from dpo_kit.data.rows import Rows
from dpo_kit.model.batches import measuring, pad_token_id
from dpo_kit.model.chats import prompt_of
from dpo_kit.model.head import Tokens
from dpo_kit.model.sampling import draw_samples
from dpo_kit.model.scoring import score, score_as_trained
from dpo_kit.model.tokens import encode_prompts
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json, write_json
from dpo_kit.run.processes import is_writer
from dpo_kit.trainer.arguments import describe_arguments
from dpo_kit.trainer.manifest import chosen_amount, sweep_folder
from dpo_kit.trainer.speed import shares_prefixes

log = logging.getLogger(__name__)
ALWAYS = 10.0  # seconds that measuring may take in any run
PATH = 4  # moments in a run of a sweep whose answers are judged
MARGIN = 0.8  # of what is allowed is planned with: times vary
PASSES = {"full": 3, "lora": 2, "qlora": 2}  # forward passes that a training step is worth, at least
TRIED_ROWS, TRIED_TOKENS = 2, 6
LONG = 2.0  # seconds of a first try that is not repeated


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much a run measures: `evaluations` after the start, the last at the end, of so many held-out `pairs` (or
    unary rows), and KL on `prompts` with answers of at most `max_new_tokens`, fresh ones at the start and at so many
    `moments` after it.
    """

    evaluations: int
    pairs: int
    prompts: int
    max_new_tokens: int
    moments: int = 2


# half-way and end; what is worth having, what is possible, and what a run of a minute or two has time for
LEAST = (Amount(2, 32, 16, 32), Amount(2, 4, 4, 16), Amount(2, 2, 2, 8))


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds: of a training step; to score a held-out row, and a token of an answer's; to read a prompt; and of a
    token that is drawn for a batch of answers, whatever its size, and for each of them more; and of what is drawn for
    the capability of a module that knows the truth.
    """

    step: float
    row: float
    token: float
    prompt: float
    draw: float = 0.0
    draw_more: float = 0.0
    capability: float = 0.0

    def measuring(self, amount: Amount) -> float:
        """Seconds that a run takes to measure `amount`; at the start both directions of the KL are one."""
        rows = (2 + amount.evaluations) * amount.pairs * self.row  # at the start policy and reference
        if amount.prompts == 0:
            return rows
        read = amount.prompts * (self.prompt + self.token * amount.max_new_tokens)
        drawn = amount.prompts * self.prompt + amount.max_new_tokens * (self.draw + self.draw_more * amount.prompts)
        forward = (2 + amount.evaluations) * read
        times = amount.moments + 1
        reverse = times * drawn + 2 * amount.moments * read  # policy and reference read those after the start
        return rows + forward + reverse + times * self.capability


def judges_answers(settings: Settings) -> bool:
    """Whether fresh answers are judged as they are drawn."""
    return bool(settings.data.gold or settings.callbacks.sample_metrics)


def wanted_moments(settings: Settings) -> int:
    """At how many moments after the start the policy is sampled, at most."""
    return settings.callbacks.path or (PATH if judges_answers(settings) and sweep_folder() else 2)


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
            floor["evaluations"] = min(amount.moments, most.evaluations)  # one for each
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
    """Before anything is measured: how much will be. `probe` (PairProbe) and `drift` (KLDrift) are told, of which one
    may be None, and the trainer's cadence is set.

    `rows` are those of training; `began` is when the run did (`time.time()`), for what came before the first step.
    """

    def __init__(
        self, trainer: Any, settings: Settings, run: RunDirectory, rows: Rows, began: float, probe: Any, drift: Any
    ) -> None:
        self.trainer, self.settings, self.run, self.rows, self.began = trainer, settings, run, rows, began
        self.probe, self.drift, self.measuring_seconds = probe, drift, 0.0

    def carry(self) -> dict[str, Any]:
        return {"measuring_seconds": self.measuring_seconds}

    def pick_up(self, carried: dict[str, Any]) -> None:
        self.measuring_seconds += carried["measuring_seconds"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (chosen,) = broadcast_object_list([chosen_amount(self.run)])
        if chosen is None:
            with agreed_file() as file:
                (agreed,) = broadcast_object_list([read_json(file) if file and file.exists() else None])
                needed = [name for name, of in (("pairs", self.probe), ("prompts", self.drift)) if of]
                fits = agreed and all(agreed[name] for name in needed)  # the first run may have measured less
                chosen = agreed if fits else vars(self.choose(state.max_steps))
                if is_writer():
                    write_json(self.run.manifest, read_json(self.run.manifest) | {"measuring": chosen})
                    if file is not None:
                        write_json(file, chosen)
        self.apply(Amount(**chosen), state)

    def choose(self, steps: int) -> Amount:
        """What is measured in a run of so many steps; the same in all of its processes."""
        callbacks, args = self.settings.callbacks, self.trainer.args
        by_steps = args.eval_strategy == "steps"
        evaluations = math.ceil(steps / args.eval_steps) if by_steps else max(1, round(args.num_train_epochs))
        most = Amount(
            evaluations,
            len(self.probe.rows) if self.probe else 0,
            len(self.drift.rows) if self.drift else 0,
            callbacks.at_most("max_new_tokens"),
            max(2, min(evaluations, wanted_moments(self.settings))) if self.drift else 2,
        )
        budget, trl = callbacks.budget, self.settings.trl
        typed = {name for name in MOST if getattr(callbacks, name) is not None}
        # evaluations come when the user says, or when checkpoints do of which the best is kept
        if not by_steps or trl["eval_steps"] is not None or (trl["load_best_model_at_end"] and trl["save_steps"]):
            typed.add("evaluations")
        if callbacks.path is not None or most.moments == 2:
            typed.add("moments")
        if budget is None or len(typed) == len(vars(most)):
            return most
        judged, started = judges_answers(self.settings), time.time()

        def allowed(costs: Costs) -> float:
            return max(ALWAYS, MARGIN * budget / (1 - budget) * (started - self.began + steps * costs.step))

        def is_enough(costs: Costs) -> bool:
            """Whether reading the least takes so much of the time that there is none for more."""
            return costs.measuring(choose_amount(most, costs, 0.0, typed, judged)) > allowed(costs) / 2

        costs = measure_costs(self.trainer, self.settings, self.probe, self.drift, self.rows, is_enough)
        self.measuring_seconds += time.time() - started
        all_of_it = f"would take {took:.0f} s" if math.isfinite(took := costs.measuring(most)) else "is too much"
        log.info(
            f"training takes about {steps * costs.step:.0f} s, measuring all {all_of_it}, and may take "
            f"{allowed(costs):.0f} s (callbacks.budget={budget:g})"
        )
        return broadcast_object_list([choose_amount(most, costs, allowed(costs), typed, judged)])[0]

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
            self.drift.take(amount.prompts, amount.max_new_tokens, amount.moments)
            path = f", fresh ones {amount.moments} times on the way" if amount.moments > 2 else ""
            length = f"answers of up to {amount.max_new_tokens} tokens{path}"
            measured.append(f"KL on {len(self.drift.rows)} prompts, {length}")
        every = "step" if args.eval_steps == 1 else f"{args.eval_steps or 0:g} steps"
        cadence = {"steps": f", every {every}", "epoch": ", every epoch"}.get(args.eval_strategy, "")
        log.info("measured at the start%s and at the end: %s", cadence, "; ".join(measured))


@contextlib.contextmanager
def agreed_file() -> Iterator[Path | None]:
    """The file in which the runs of a sweep agree, while no other one chooses; None outside a sweep."""
    if (folder := sweep_folder()) is None:
        yield None
        return
    with FileLock(folder / ".measuring.lock") if is_writer() else contextlib.nullcontext():
        yield folder / "measuring.json"


def measure_costs(
    trainer: Any, settings: Settings, probe: Any, drift: Any, trained_rows: Rows, is_enough: Callable[[Costs], bool]
) -> Costs:
    """Times of this model on this machine, from a few rows that are scored and a few answers that are drawn; where
    `is_enough` says so of the times of the rows alone nothing is drawn, and drawing counts as endless.
    """
    trl, tokenizer = settings.trl, trainer.processing_class
    prompts = encode_prompts(tokenizer, [prompt_of(row) for row in drift.rows]) if drift else []
    rows = probe.by_row() if probe else [[(ids[:1], ids[1:])] for ids in prompts]
    once = shares_prefixes(trainer.model)
    sizes = [count_tokens(len(row[0][0]), [len(answer) for _, answer in row], once) for row in rows]
    tried = sorted(zip(sizes, rows, strict=True), key=itemgetter(0))[len(rows) // 2 :]  # none of the shorter half
    with measuring(trainer):
        token = trained = seconds_per_token(tried, partial(score, trainer.model, pad_id=pad_token_id(tokenizer)))
    if trainer.args.bf16 or trainer.args.fp16:  # else it trains as it measures
        with measuring(trainer, as_trained=True):
            trained = seconds_per_token(tried, partial(score_as_trained, trainer, trainer.model))
    batch = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    counts = [row["tokens"] for row in with_answer_lengths(trained_rows, trl.get("max_new_tokens"))]
    answers = [[count for name, count in row.items() if name not in ("prompt", "cut")] for row in counts]
    a_row = mean(count_tokens(row["prompt"], others, once) for row, others in zip(counts, answers, strict=True))
    step = PASSES[settings.model.tuning] * trained * batch * a_row
    prompt = token * mean(map(len, prompts)) if drift else 0.0
    share = 1 / trainer.accelerator.num_processes  # they take turns at what is measured
    costs = Costs(step, token * mean(sizes) * share, token * share, prompt * share)
    draws = settings.method.rows == "prompts"
    if not drift or (not draws and broadcast_object_list([is_enough(costs)])[0]):
        return dataclasses.replace(costs, draw=math.inf) if drift else costs
    with measuring(trainer):
        draw, draw_more = time_drawing(trainer, drift, prompt)
    if draws:
        step += trl["max_new_tokens"] * (draw + 2 * batch * draw_more)
    capability = 0.0
    if settings.data.gold:
        gold = load_gold(settings.data.gold)
        capability = gold.MAX_NEW_TOKENS * (draw + draw_more * len(gold.capability_prompts()))
    return dataclasses.replace(costs, step=step, draw=draw, draw_more=draw_more * share, capability=capability * share)


def time_drawing(trainer: Any, drift: Any, prompt: float) -> tuple[float, float]:
    """Seconds of a drawn token for a batch of answers, and for each of them more; `prompt`: to read a prompt."""
    several = min(TRIED_ROWS, len(drift.rows))

    def per_token(count: int, tokens: int) -> float:
        started = time.monotonic()
        drawn = draw_samples(trainer.model, trainer.processing_class, drift.rows[:count], max_new_tokens=tokens)
        seconds = time.monotonic() - started - count * prompt
        return max(0.0, seconds) / max(len(sample.token_ids) for sample in drawn)

    per_token(1, 1)  # the first time takes longer
    one, more = per_token(1, TRIED_TOKENS), per_token(several, TRIED_TOKENS)
    for_each = max(0.0, more - one) / max(1, several - 1)
    return max(0.0, one - for_each), for_each


def seconds_per_token(rows: Sequence[tuple[int, list[Tokens]]], work: Callable[[list[Tokens]], Any]) -> float:
    """What a token costs `work`, tried on a few of `rows`, each with the tokens that are computed for it."""
    for some in (rows[:1], rows[:TRIED_ROWS]):
        started = time.monotonic()
        work([tokens for _, row in some for tokens in row])
        seconds = time.monotonic() - started
        if broadcast_object_list([seconds])[0] >= LONG:  # else again, as the first time takes longer: all processes do
            break
    return seconds / sum(size for size, _ in some)


def count_tokens(prompt: int, answers: Sequence[int], once: bool) -> int:
    """Tokens that are computed for the answers of a row; `once`: with their prompt only once."""
    return sum(answers) + prompt * (1 if once else len(answers))
