"""What training and measuring cost here, in seconds, tried on a few rows; loaded where a budget asks for it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from statistics import mean
from typing import Any

from accelerate.utils import broadcast_object_list

from dpo_kit.callbacks.gold import load_gold
from dpo_kit.config.settings import Settings
from dpo_kit.data.prepare import with_answer_lengths
from dpo_kit.model.batches import measuring, pad_token_id
from dpo_kit.model.chats import prompt_of
from dpo_kit.model.head import Tokens
from dpo_kit.model.sampling import draw_samples
from dpo_kit.model.scoring import score, score_as_trained
from dpo_kit.model.tokens import encode_prompts
from dpo_kit.trainer.budget import Amount
from dpo_kit.trainer.speed import shares_prefixes

PASSES = {"full": 3, "lora": 2, "qlora": 2}  # forward passes that a training step is worth, at least
TRIED_ROWS, TRIED_TOKENS = 4, 8
LONG = 2.0  # seconds of a first try that is not repeated


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
    draw: float
    draw_more: float
    capability: float = 0.0

    def measuring(self, amount: Amount) -> float:
        """Seconds that a run takes to measure `amount`."""
        rows = (2 + amount.evaluations) * amount.pairs * self.row  # at the start policy and reference
        if amount.prompts == 0:
            return rows
        read = amount.prompts * (self.prompt + self.token * amount.max_new_tokens)
        drawn = amount.prompts * self.prompt + amount.max_new_tokens * (self.draw + self.draw_more * amount.prompts)
        forward = (2 + amount.evaluations) * read
        reverse = 3 * drawn + 4 * read  # at start, half-way and end; policy and reference read the later ones
        return rows + forward + reverse + 3 * self.capability


def measure_costs(
    trainer: Any, settings: Settings, probe: Any, drift: Any, trained_rows: Sequence[dict[str, Any]]
) -> Costs:
    """Times of this model on this machine, from a few rows that are scored and a few answers that are drawn."""
    trl, tokenizer = settings.trl, trainer.processing_class
    prompts = encode_prompts(tokenizer, [prompt_of(row) for row in drift.rows]) if drift else []
    rows = probe.by_row() if probe else [[(ids[:1], ids[1:])] for ids in prompts]
    once = shares_prefixes(trainer.model)
    sizes = [count_tokens(len(row[0][0]), [len(answer) for _, answer in row], once) for row in rows]
    tried = sorted(zip(sizes, rows, strict=True), key=itemgetter(0))[len(rows) // 2 :]  # none of the shorter half
    prompt = draw = draw_more = capability = 0.0
    with measuring(trainer):
        token = seconds_per_token(tried, partial(score, trainer.model, pad_id=pad_token_id(tokenizer)))
        if drift:
            prompt = token * mean(map(len, prompts))
            draw, draw_more = time_drawing(trainer, drift, prompt)
    with measuring(trainer, as_trained=True):
        trained = seconds_per_token(tried, partial(score_as_trained, trainer, trainer.model))
    batch = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    counts = [row["tokens"] for row in with_answer_lengths(trained_rows, trl.get("max_new_tokens"))]
    answers = [[count for name, count in row.items() if name not in ("prompt", "cut")] for row in counts]
    a_row = mean(count_tokens(row["prompt"], others, once) for row, others in zip(counts, answers, strict=True))
    step = PASSES[settings.model.tuning] * trained * batch * a_row
    if settings.method.rows == "prompts":
        step += trl["max_new_tokens"] * (draw + 2 * batch * draw_more)
    if drift and settings.data.gold:
        gold = load_gold(settings.data.gold)
        capability = gold.MAX_NEW_TOKENS * (draw + draw_more * len(gold.capability_prompts()))
    share = 1 / trainer.accelerator.num_processes  # they take turns at what is measured
    return Costs(
        step, token * mean(sizes) * share, token * share, prompt * share, draw, draw_more * share, capability * share
    )


def time_drawing(trainer: Any, drift: Any, prompt: float) -> tuple[float, float]:
    """Seconds of a drawn token for a batch of answers, and for each of them more; `prompt`: to read a prompt."""
    several = min(TRIED_ROWS, len(drift.rows))

    def per_token(count: int, tokens: int) -> float:
        started = time.monotonic()
        drawn = draw_samples(trainer.model, trainer.processing_class, drift.rows[:count], max_new_tokens=tokens)
        seconds = time.monotonic() - started - count * prompt
        return max(0.0, seconds) / max(len(sample.token_ids) for sample in drawn)

    per_token(1, 2)  # the first time takes longer
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
