"""The options of `python -m dpo_kit evaluate` (conf/tool/evaluate.yaml), checked before anything heavy is loaded."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from dpo_kit.config.building import TopP
from dpo_kit.config.settings import Endpoint, Judge, Strict

Split = Literal["select", "test", "all"]


class WinRate(Strict):
    """Which prompts both sides answer, and how."""

    prompts: str | None
    limit: PositiveInt | None
    draws: PositiveInt
    temperature: NonNegativeFloat | None
    top_p: TopP | None
    max_new_tokens: PositiveInt
    seed: NonNegativeInt
    opponent_seed: NonNegativeInt
    policy_server: Endpoint | None
    opponent_server: Endpoint | None
    stop_early: bool
    within: Annotated[float, Field(gt=0, lt=0.5)]
    judge_accuracy: Annotated[float, Field(gt=0.5, le=1)]


class Harness(Strict):
    """The regression gate: tasks of lm-evaluation-harness, by the policy and by its reference."""

    tasks: list[str] = Field(default=["gsm8k", "ifeval", "arc_challenge", "hellaswag", "truthfulqa_mc2"], min_length=1)
    include_path: list[str] = Field(default=[])  # folders with task files of one's own
    metrics: dict[str, str] = Field(default={})  # task: "metric" or "metric,filter", where not the usual one counts
    max_regression: NonNegativeFloat = 0.03  # in the metric's own unit (most are shares, 0 to 1)
    limit: PositiveInt | None = None  # samples of each task; None: all
    num_fewshot: NonNegativeInt | None = None  # None: as the task says
    chat: Literal["auto"] | bool = "auto"  # render with the chat template; auto: where the tokenizer has one
    batch_size: PositiveInt = 8
    seed: NonNegativeInt = 0
    allow_code: bool = False  # tasks that execute what a model wrote (humaneval, mbpp)


class Alpaca(Strict):
    """AlpacaEval 2: outputs written in its format, its annotations read back."""

    instructions: str | None = None  # its alpaca_eval.json, or any list of {instruction}; None: from the hub
    annotators_config: str = "weighted_alpaca_eval_gpt4_turbo"
    limit: PositiveInt | None = None
    temperature: NonNegativeFloat = 0.7
    max_new_tokens: PositiveInt = 2048


class MTBench(Strict):
    """MT-Bench: two-turn questions, each answer graded from 1 to 10 by the language model of `judge=llm`."""

    questions: str  # FastChat's question.jsonl
    references: str | None = None  # FastChat's reference_answer/*.jsonl, where the questions hold no `reference`
    limit: PositiveInt | None = None
    max_new_tokens: PositiveInt = 1024


def _compiles(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    if groups > 1:
        raise ValueError(f"{pattern!r} has {groups} groups; it takes one, which holds the label, or none")
    return pattern


class Domain(Strict):
    """A labelled file of one's own."""

    file: str  # rows of {prompt, label} or of {prompt, reference}
    pattern: Annotated[str, AfterValidator(_compiles)] | None = None  # finds the label in an answer: `Answer: (\w+)`
    temperature: NonNegativeFloat = 0
    max_new_tokens: PositiveInt = 512
    limit: PositiveInt | None = None


Listed = Annotated[list[str], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]


class Evaluate(Strict):
    """What is evaluated, against what, where to; None: no judge, or a part that is not asked for."""

    run: str | None
    sweep: str | None
    policy: str | None
    reference: str | None
    against: str | None
    out: str | None
    step: PositiveInt | None
    parts: Listed = Field(min_length=1)
    split: Split | None
    review: NonNegativeInt
    win_rate: WinRate
    judge: Judge | None
    gate: Harness | None
    alpaca_eval: Alpaca | None
    mt_bench: MTBench | None
    domain: Domain | None
