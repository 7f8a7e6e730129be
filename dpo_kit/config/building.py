"""The shape of what builds pairs: who answers the prompts, how often, and what becomes of the answers."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, Tag

from dpo_kit.config.settings import Endpoint, Strict

TopP = Annotated[float, Field(gt=0, le=1)]  # the share of the probability that is drawn from


class Drawing(Strict):
    """How often a model answers each prompt, and how."""

    temperatures: list[NonNegativeFloat | None] = Field(default=[1.0])  # None: as its own generation_config samples
    top_p: TopP | None = None  # None: all of the probability; where the temperature is None, its own
    draws: PositiveInt = 2  # at each temperature


class LocalAnswers(Drawing):
    """Answers of a model that is loaded here."""

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class ServerAnswers(Drawing, Endpoint):
    """Answers of a model behind a server."""


Answers = Annotated[
    Annotated[LocalAnswers, Tag("local")] | Annotated[ServerAnswers, Tag("server")],
    Discriminator(lambda value: "local" if "path" in value else "server"),
]


class Build(Strict):
    """How preference pairs are built from prompts."""

    prompts: str | None
    limit: PositiveInt | None
    answers: list[Answers] = Field(min_length=1)
    max_new_tokens: PositiveInt
    pairs: Literal["best_worst", "all"]
    undecided: Literal["drop", "coin"]
    review: NonNegativeInt
    votes: str | None
