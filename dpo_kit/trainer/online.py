"""A policy that learns from its own fresh answers: a judge as TRL's reward function, and what TRL's trainer lacks.

    with open_judged_reward(settings.judge, settings.seed, run) as reward:
        trainer = with_mixins(OnlineDPOTrainer, FreshAnswers)(reward_funcs=reward, callbacks=[reward], …)

The judge is shown every two answers in both orders. Where it does not decide, a seeded coin does, and that is counted.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from dpo_kit.config.settings import Judge as JudgeSettings
from dpo_kit.config.settings import LLMJudge
from dpo_kit.errors import TrainingError
from dpo_kit.judge.open import open_judge
from dpo_kit.judge.verdicts import Judge, Prompt, compare, toss_coin
from dpo_kit.model.batches import pad_batch, pad_token_id
from dpo_kit.model.chats import text_of
from dpo_kit.model.sampling import draw_samples, without_router_logits
from dpo_kit.model.scoring import ReferenceModel, add_up, score_as_trained
from dpo_kit.model.tokens import decode_answer, encode_prompts, render_prompts
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.processes import rank, world_size

log = logging.getLogger(__name__)
Base: Any = object  # in use, a trainer follows in the method resolution order
DECIDED = ("win", "loss")
BUDGET = ("max_cost", "max_requests")  # may differ when a run goes on
COINS = ("tie", "order-dependent", "unjudged", "identical")
"""Why a coin was tossed: the judge calls both as good, follows their order, gives no verdict; or is not asked."""


class JudgedReward(TrainerCallback):
    """A reward function of TRL: of a prompt's two answers the better one gets 1, the other 0.

    A callback as well, so that a resumed run goes on counting (see resume/carried_state.py).
    """

    def __init__(self, judge: Judge, seed: int) -> None:
        self.judge, self.seed = judge, seed
        self.counts: Counter[str] = Counter()
        self.latest: list[float] = []  # of the last call: matches, coins, identical answers, scores and their sum

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Prompt], *, trainer_state: Any, **_: Any
    ) -> list[float]:
        """Points of 2n answers, of which the i-th and the (n + i)-th belong to one prompt.

        TrainingError where the judge has given up: coins alone teach nothing.
        """
        half, texts = len(prompts) // 2, [text_of(each) for each in completions]
        matches = list(zip(prompts[:half], texts[:half], texts[half:], strict=True))
        asked = [match for match in matches if match[1] != match[2]]  # equal answers are not shown to the judge
        verdicts = iter(compare(self.judge, *map(list, zip(*asked, strict=True))) if asked else ())
        outcomes: list[str] = ["identical" if a == b else next(verdicts).outcome for _, a, b in matches]
        if "unjudged" in outcomes and (reason := self.judge.spend().get("stopped")):
            key = reason.partition("=")[0]
            shared = f" (which {world_size()} processes share)" if world_size() > 1 else ""
            remedy = f"raise judge.{key}{shared}" if key in BUDGET else "once it answers"
            raise TrainingError(
                f"{self.judge.name} gives no more verdicts ({reason}), and coins alone teach nothing: {remedy}, and "
                "the same command goes on from the last checkpoint, and asks nothing twice"
            )
        points = []
        for outcome, (prompt, first, second) in zip(outcomes, matches, strict=True):
            won = outcome == "win"
            if outcome in COINS:  # thrown anew at every step, for the answer whose text comes first, wherever it stands
                low, high = sorted((first, second))
                won = toss_coin(self.seed, trainer_state.global_step, prompt, low, high) == (first == low)
            points.append(float(won))
        self.counts.update(outcomes)
        scores = self.judge.scores(prompts, texts) or ()
        coins = sum(outcome in COINS for outcome in outcomes)
        self.latest = [len(outcomes), coins, outcomes.count("identical"), len(scores), sum(scores)]
        return [*points, *(1 - each for each in points)]

    def figures(self, accelerator: Any) -> dict[str, float]:
        """Of the last call in all processes: shares of coins and identical answers, and the judge's mean score."""
        matches, tossed, identical, scored, total = _over_processes(self.latest, accelerator)
        figures = {"judge/coin_share": tossed / matches, "judge/identical_share": identical / matches}
        return figures | ({"judge/score": total / scored} if scored else {})

    def carry(self) -> dict[str, Any]:
        return {"counts": dict(self.counts)}

    def pick_up(self, carried: dict[str, Any]) -> None:
        self.counts = Counter(carried["counts"])

    def summary(self, accelerator: Any) -> dict[str, Any]:
        """Comparisons of all processes since the run began, how many a coin has decided and why, and what they cost."""
        names = (*DECIDED, *COINS)
        counts = _over_processes([self.counts[name] for name in names], accelerator)
        total = {name: int(count) for name, count in zip(names, counts, strict=True)}
        return {
            "name": self.judge.name,
            "comparisons": sum(total.values()),
            "decided": sum(total[name] for name in DECIDED),
            "coins": {name: total[name] for name in COINS},
            "spend": add_spends(gather_object([self.judge.spend()])),
        }


def _over_processes(values: Sequence[float], accelerator: Any) -> list[float]:
    """The sum of each value over all processes."""
    return add_up(torch.tensor(values, dtype=torch.float64), accelerator).tolist()


def add_spends(spends: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the judges of several processes have spent together; of what is no number, the first that is there."""
    total = dict(spends[0])
    for name, value in (item for each in spends[1:] for item in each.items()):
        if isinstance(value, dict):
            total[name] = dict(Counter(total[name]) + Counter(value))
        else:
            total[name] = total[name] + value if isinstance(value, int | float) else total[name] or value
    return total


@contextmanager
def open_judged_reward(settings: JudgeSettings, seed: int, run: RunDirectory) -> Iterator[JudgedReward]:
    """The judge of `settings` as a reward. What it says is kept in the run directory.

    Each of several processes has its own judge, with an equal part of what it may cost.
    """
    folder = run.judge / f"rank-{rank()}" if world_size() > 1 else run.judge
    if isinstance(settings, LLMJudge):
        cost, requests = settings.max_cost, settings.max_requests
        part = {"max_cost": cost and cost / world_size(), "max_requests": requests and requests // world_size()}
        settings = settings.model_copy(update=part)
    with open_judge(settings, folder, seed) as judge:
        log.info("fresh answers are compared by %s, in both orders", judge.name)
        yield JudgedReward(judge, seed)


def compare_fresh(trainer: Any, reference: ReferenceModel, sample: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Policy less reference on fresh answers to the prompts of `sample`, as the loss reads them (nats), and the tokens
    of each: (answers,) twice.
    """
    rows = [{"prompt": json.loads(row["prompt"])} for row in sample]
    length = trainer.args.max_new_tokens
    drawn = draw_samples(trainer.model, trainer.processing_class, rows, max_new_tokens=length)
    answers = [(each.prompt_ids, each.token_ids) for each in drawn]
    policy = score_as_trained(trainer, trainer.model, answers)
    with reference.active() as model:
        differences = policy - score_as_trained(trainer, model, answers)
    return differences, torch.tensor([len(ids) for _, ids in answers])


class FreshAnswers(Base):
    """Mixin before TRL's OnlineDPOTrainer: prompts (as JSON) are read as everywhere; gradients are means."""

    processing_class: Any

    def _generate(self, model: Any, prompts: Sequence[str], images: Any = None) -> Any:
        """TRL renders prompts without their tools and reads raw text without the BOS that all other trainers add."""
        tokenizer = self.processing_class
        encoded = encode_prompts(tokenizer, list(map(json.loads, prompts)))
        ids, mask = pad_batch(encoded, pad_token_id(tokenizer), torch.device("cpu"), "left")
        self.processing_class = lambda text, **_: {"input_ids": ids, "attention_mask": mask}
        try:
            with without_router_logits(self.accelerator.unwrap_model(model)):
                return super()._generate(model, prompts, images)
        finally:
            self.processing_class = tokenizer

    def _generate_vllm(self, prompts: Sequence[str], images: Any = None) -> Any:
        return super()._generate_vllm(render_prompts(self.processing_class, list(map(json.loads, prompts))), images)

    def _calculate_rewards_from_functions(
        self, prompts: Sequence[str], completions: Any, completion_ids_list: Sequence[list[int]], **given: Any
    ) -> torch.Tensor:
        """TRL's own texts lack what a model writes in special tokens (`<think>`)."""
        asked = list(map(json.loads, prompts))
        texts = [decode_answer(self.processing_class, ids) for ids in completion_ids_list]
        rewards = super()._calculate_rewards_from_functions(asked, texts, completion_ids_list, **given)
        for reward in (each for each in self.reward_funcs if isinstance(each, JudgedReward)):
            for key, value in reward.figures(self.accelerator).items():
                self.stats.setdefault(key, []).append(value)
        return rewards

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's step does not divide its loss by the number of accumulated batches: accelerate does it here."""
        self.accelerator.gradient_accumulation_steps = self.current_gradient_accumulation_steps
        return super().training_step(model, inputs, *args, **kwargs)
