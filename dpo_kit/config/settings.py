"""The shape of a composed config: what each key of dpo_kit's own is called, what type it has, what it means.

The `trl` block is not described here: it is TRL's own, see trl_schema.py.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

FormName = Literal[
    "pairs", "chat", "hh_rlhf", "responses", "stack_exchange", "unary", "chat_unary", "swift", "swift_chat", "alpaca",
    "openai", "pku_saferlhf", "shp", "arena", "arena_text", "helpsteer", "helpsteer3", "ultrafeedback", "ranked",
    "scored", "rated", "prompts",
]  # fmt: skip
"""The forms of rows that are read as they are, by their columns: see data/published.py."""
FileName = Annotated[str, Field(pattern=r"^[\w+-][\w.+-]*$")]  # becomes part of a path: no separators, no dots alone


class Strict(BaseModel):
    """Unknown keys are errors; `model_…` names are ordinary ones."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Rates(Strict):
    """A learning rate for full tuning and one for LoRA and QLoRA, per optimizer step."""

    full: PositiveFloat
    lora: PositiveFloat

    def for_tuning(self, tuning: str) -> float:
        return self.full if tuning == "full" else self.lora


class Beta(Strict):
    """What beta means in a method, which way it pulls, and where it makes sense."""

    meaning: str
    higher: Literal["closer", "stronger"]  # closer to the reference | stronger preference term
    grid: list[PositiveFloat]
    range: tuple[PositiveFloat, PositiveFloat]


class Method(Strict):
    """One method file: everything in which methods differ."""

    name: FileName
    title: str
    paper: str
    equation: str
    config: str  # import path of TRL's config class, set by the trl option that the file names
    trainer: str  # import path of TRL's trainer class
    rows: Literal["pairs", "unary", "prompts"]  # what it trains on; prompts: it draws its answers itself
    reference: bool  # the trainer takes a reference model
    start: Literal["instruct", "any"]  # the kind of model that the method is meant to start from
    implicit_reward: bool  # beta x logratio is the reward that the loss compares
    saturation: Literal["dpo", "dpo_norm", "ipo"] | None  # how to tell that beta is felt; None: no such measure
    beta: Beta
    learning_rate: Rates


class Model(Strict):
    """Policy, reference and how the weights are tuned."""

    path: str
    revision: str | None
    tuning: Literal["full", "lora", "qlora"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    attn_implementation: str | None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # what data.chat_template_kwargs is where it is not said
    trust_remote_code: bool
    reference: str | None
    learning_rate: Rates | None
    max_learning_rate: Rates
    lora: dict[str, Any]
    quantization: dict[str, Any]


class Source(Strict):
    """One data source of a mixture; weight 0.5 takes a seeded half of its prompts, 2 takes each twice."""

    path: str
    weight: PositiveFloat = 1.0
    form: FormName | None = None  # None: data.form
    config: str | None = None  # None: data.config


def _named(given: Any) -> Any:
    """Paths in a list as sources of weight 1."""
    if not isinstance(given, list):
        return given
    if not given or not all(isinstance(item, str | dict | Source) for item in given):
        raise ValueError("a list here holds files, or {path: …, weight: …}")
    return [{"path": item} if isinstance(item, str) else item for item in given]


Sources = Annotated[str | list[Source], BeforeValidator(_named)]


class Data(Strict):
    """Where the rows come from and what is done with faulty ones."""

    train: Sources
    eval: Sources | None
    train_split: str
    eval_split: str | None
    config: str | None = None
    form: FormName | None = None
    columns: Annotated[dict[str, str], BeforeValidator(lambda given: given or {})]
    holdout: float = Field(gt=0, lt=1)
    wrap_as_chat: Literal["auto"] | bool
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(lambda given: given or {})] = {}
    fold_system: bool = False
    on_bad_row: Literal["fail", "drop"]
    gold: str | None
    benchmark: str | None = None
    reference_margin: bool = False


class Speed(Strict):
    """What is done to be fast; only group_by_length changes what is trained: the order of rows."""

    reference_store: Literal["auto"] | bool
    share_prefix: Literal["auto"] | bool
    group_by_length: Literal["auto"] | bool
    checkpointing: Literal["auto"] | bool


MOST = {"pairs": 256, "prompts": 64, "max_new_tokens": 128}  # that are measured where no number is given


class Callbacks(Strict):
    """What the probe measures and on how much."""

    preference_margin: bool
    implicit_reward: bool
    kl_drift: bool
    budget: Annotated[float, Field(gt=0, lt=1)] | None = 0.1
    pairs: PositiveInt | None
    prompts: PositiveInt | None
    max_new_tokens: PositiveInt | None
    path: Annotated[int, Field(ge=2)] | None = None
    preview: list[PositiveFloat]
    eval_loss: Literal["auto"] | bool = "auto"
    patience: PositiveInt | None = None
    metrics: Annotated[dict[FileName, str], BeforeValidator(lambda given: given or {})] = {}  # called with rows, scores
    sample_metrics: Annotated[dict[FileName, str], BeforeValidator(lambda given: given or {})] = {}  # prompts, answers
    extra: list[dict[str, Any]] = []

    @property
    def scores_rows(self) -> bool:
        """Whether held-out rows are scored."""
        return self.preference_margin or self.implicit_reward or bool(self.metrics)

    def at_most(self, name: str) -> int:
        """How many `pairs`, `prompts` or `max_new_tokens` a run measures at most."""
        return getattr(self, name) or MOST[name]


class Tracking(Strict):
    """Where the metrics go beside the run directory."""

    reporter: str
    project: str
    entity: str | None
    group: str | None
    tags: list[str]
    name: str


class Choose(Strict):
    """What a run must keep to be recommended at the end of a sweep."""

    kl_budget_nats: PositiveFloat = 10.0  # reverse KL to the reference, per answer
    max_regression: float = Field(default=0.03, ge=0, le=1)  # capability lost, a share


class Experiment(Strict):
    """A published run that an experiment file repeats: where it stands, and what it reached there."""

    name: FileName
    title: str
    source: str
    batch: PositiveInt  # rows per optimizer step, over all devices
    expected: dict[str, Annotated[list[float], Field(min_length=1)]] = {}  # by measured key, a value of each report
    expected_from: str


class Endpoint(Strict):
    """A model behind an OpenAI-compatible server, and what asking it may cost."""

    base_url: str = Field(pattern="^https?://")
    model: str
    api_key_env: str | None = None  # the name of the environment variable that holds the key; None: no key
    timeout_s: PositiveFloat = 120
    retries: NonNegativeInt = 5  # after 429, 5xx, time-outs, cut connections and replies that make no sense
    workers: PositiveInt = 4  # requests at a time
    price_in: NonNegativeFloat = 0  # per million tokens, in any currency
    price_out: NonNegativeFloat = 0
    max_cost: PositiveFloat | None = None  # in that currency
    max_requests: PositiveInt | None = None
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # what the server calls it


class GoldJudge(Strict):
    """A reward that is known: a module with `gold_rewards(prompts, answers)`."""

    kind: Literal["gold"]
    module: str
    tie_margin: NonNegativeFloat = 0  # scores that are no further apart are a tie


class RewardModelJudge(Strict):
    """A sequence-classification checkpoint with one output."""

    kind: Literal["reward_model"]
    path: str
    revision: str | None = None
    max_length: PositiveInt = 2048
    batch_size: PositiveInt = 16
    tie_margin: NonNegativeFloat = 0


class LLMJudge(Endpoint):
    """A language model with a rubric."""

    kind: Literal["llm"]
    rubric: str
    temperature: NonNegativeFloat | None = 0  # None: not sent, for models that refuse the field
    max_tokens: PositiveInt = 512
    controls: NonNegativeInt = 16  # prompts that each control is tried on


class HumanJudge(Strict):
    """People who fill in a review sheet; several sheets are several raters."""

    kind: Literal["human"]
    sheets: list[str] = []


Judge = Annotated[GoldJudge | RewardModelJudge | LLMJudge | HumanJudge, Field(discriminator="kind")]


class Settings(Strict):
    """A whole run, checked."""

    beta: float
    seed: int = Field(ge=0, lt=2**32)  # what numpy takes
    resume: str
    dry_run: bool = False
    allow_beta: bool
    allow_learning_rate: bool
    method: Method
    model: Model
    data: Data
    speed: Speed
    callbacks: Callbacks
    choose: Choose
    tracking: Tracking
    judge: Judge | None = None  # of a method whose answers are drawn while it trains
    experiment: Experiment | None = None
    trl: dict[str, Any]


COST_ONLY = ("api_key_env", "batch_size", "controls", "max_cost", "max_requests", "price_in", "price_out",
             "retries", "sheets", "timeout_s", "workers")  # fmt: skip
