"""From overrides to a checked config, without importing torch or trl.

`compose` builds the config from conf/ as Hydra does; `check` refuses what cannot train as meant and returns it typed.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import hydra
import pydantic
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dpo_kit.config.limits import checked_value, idle_faults, library_faults
from dpo_kit.config.places import locate
from dpo_kit.config.settings import Model, Rates, Settings, Strict
from dpo_kit.config.trl_schema import load_schema
from dpo_kit.errors import ConfigError
from dpo_kit.run.redact import refuse_secrets
from dpo_kit.run.words import readable

PACKAGE = Path(__file__).resolve().parents[1]
S = TypeVar("S", bound=Strict)
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # wheel | checkout

SET_ELSEWHERE = {
    "output_dir": "hydra.run.dir=…",
    "report_to": "tracking=…",
    "run_name": "tracking.name=…",
    "model_init_kwargs": "model.…",
    "trust_remote_code": "model.trust_remote_code=…",
    "resume_from_checkpoint": "resume=…",
    "reward_model_path": "judge=reward_model judge.path=…",
    "reward_weights": "judge=…",
}
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
REPORTERS = ("clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio")


def register() -> None:
    """Make TRL's fields, the reporters and the resolvers known to Hydra; harmless when repeated."""
    store = ConfigStore.instance().store
    for name, described in load_schema()["classes"].items():
        fields = {key: field["default"] for key, field in described["fields"].items() if key not in SET_ELSEWHERE}
        store(name, {"method": {"config": described["path"]}, "trl": fields}, group="trl", package="_global_")
    for reporter in REPORTERS:
        store(reporter, {"defaults": ["wandb", "_self_"], "reporter": reporter}, group="tracking")
    resolvers: dict[str, Callable[..., Any]] = {
        "file": lambda name: str(PACKAGE / name),
        "multiply": lambda a, b: float(a) * float(b),
        "learning_rate": lambda of_model, of_method, tuning: Rates(**(of_model or of_method)).for_tuning(tuning),
        "file_name": lambda value: re.sub(r"[^\w.+-]+", "_", str(value).rstrip("/").rpartition("/")[2]),
        "path_name": lambda value: re.sub(r"[^\w.+-]+", "_", str(value)).strip("_"),
        "listed": lambda text: ListConfig([item.strip() for item in str(text).split(",") if item.strip()]),
        "sweep_id": lambda: "unnamed",  # the command line puts the hash of the jobs here
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(f"dpo_kit.{name}", resolver, replace=True)


def own_folders(sources: Iterable[Any]) -> list[str]:
    """The flags that bring back a command's folders of its own, of `hydra.runtime.config_sources`."""
    return [f"--config-dir={source['path']}" for source in sources if source["provider"] == "command-line"]


def compose(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> DictConfig:
    """The config that `python -m dpo_kit <overrides>` would run, checked.

    `config_dir` adds a folder of your own options, as `--config-dir` does. Raises ConfigError.
    """
    cfg = compose_unchecked([*search_path(config_dir), *overrides])
    refuse_idle(check(cfg), overrides)
    return cfg


def search_path(config_dir: str | Path | None) -> list[str]:
    """What makes Hydra look for options in `config_dir` too, where there is one."""
    return [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []


def refuse_idle(settings: Settings, words: Sequence[str]) -> None:
    """ConfigError for overrides that would change nothing."""
    if faults := [*idle_faults(settings, words)]:
        raise ConfigError("\n".join(faults))


def compose_unchecked(overrides: Sequence[str], config_name: str = "config", *, with_hydra: bool = False) -> DictConfig:
    register()
    overrides = readable(overrides)
    try:
        with _no_job(), hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF), job_name="dpo_kit"):
            cfg = hydra.compose(config_name, overrides=overrides, return_hydra_config=with_hydra)
    except Exception as error:  # Hydra lets some of its own kinds through, and ValueError for an option that is no name
        from dpo_kit.config.explain import explain

        raise explain(error, overrides) from error
    refuse_secrets(OmegaConf.to_container(cfg, resolve=False), overrides)
    return cfg


def without_hydra(cfg: DictConfig) -> DictConfig:
    """`cfg` as a job's task sees it."""
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.pop("hydra", None)
    return cfg


@contextmanager
def _no_job() -> Iterator[None]:
    """Hydra's job that is running, if any, set aside: Hydra composes nothing else beside it."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running


def check(cfg: DictConfig, *, trains: bool = True) -> Settings:
    """`cfg` resolved and typed; ConfigError lists every fault with key, rule, value and remedy.

    `trains=False`, of tools that have a judge of their own: nobody needs to compare fresh answers.
    """
    values = resolve(cfg, cfg)
    refuse_secrets(values)
    judge = values.get("judge") or {}
    if judge.get("kind") == "gold" and judge.get("module") is None:  # the default, which data of one's own do not have
        raise ConfigError(f"data.gold is null, and method={cfg.method.name} {NEEDS_JUDGE}")
    settings = typed(Settings, values)
    faults = [*_trl_faults(settings)]  # the others rely on types
    if not faults:
        faults = [*_method_faults(settings), *_model_faults(settings.model)]
        faults += _judge_faults(settings) if trains else []
    if not faults:
        faults, own, trl = [*library_faults(settings)], settings.callbacks, settings.trl
        chooses = own.patience or trl["metric_for_best_model"] or trl["load_best_model_at_end"]
        if chooses or trl["save_strategy"] == "best":
            from dpo_kit.config.best_metric import selection_faults

            faults += selection_faults(settings)
        if own.metrics or own.sample_metrics or own.extra:  # where none is named, nothing is loaded
            from dpo_kit.config.extensions import own_faults

            faults += own_faults(own)
    if faults:
        raise ConfigError("\n".join(faults))
    return settings


def resolve(cfg: DictConfig, names: Iterable[Any]) -> dict[str, Any]:
    """The parts `names` of `cfg` as plain values, nothing missing in them. Raises ConfigError."""
    try:
        parts = {str(name): cfg[name] for name in names}
        plain = partial(OmegaConf.to_container, resolve=True, throw_on_missing=True)
        return {name: plain(part) if OmegaConf.is_config(part) else part for name, part in parts.items()}
    except OmegaConfBaseException as error:
        from dpo_kit.config.explain import explain

        raise explain(error) from error


def typed(kind: type[S], values: dict[str, Any], known: Iterable[str] | None = None) -> S:
    """`values` as a `kind`. ConfigError lists all faults, with near misses among `known` keys (None: a run's)."""
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        from dpo_kit.config.explain import describe_fault

        raise ConfigError("\n".join(describe_fault(fault, known) for fault in error.errors())) from error


# --- faults in the trl block -------------------------------------------------------------------------------------


def _trl_faults(settings: Settings) -> Iterator[str]:
    described = load_schema()["classes"].get(settings.method.config.rsplit(".", 1)[-1])
    if described is None:
        known = ", ".join(load_schema()["classes"])
        yield f"method.config must be one of TRL's classes ({known}), got {settings.method.config}"
        return
    for key, value in settings.trl.items():
        if key not in described["fields"] or key in SET_ELSEWHERE:
            from dpo_kit.config.explain import unknown_key

            yield unknown_key(f"trl.{key}", fields_of(described))
        elif value is not None:
            settings.trl[key], faults = checked_value(f"trl.{key}", value, described["fields"][key])
            yield from faults
    for key, value in (("beta", settings.beta), ("seed", settings.seed)):
        if (given := settings.trl[key]) not in (value, [value]):
            yield f"trl.{key} follows {key}: say {key}={given} instead of trl.{key}={given}"


def fields_of(described: dict[str, Any]) -> list[str]:
    return [f"trl.{key}" for key in described["fields"] if key not in SET_ELSEWHERE]


# --- faults of the method as a whole -----------------------------------------------------------------------------


def _method_faults(settings: Settings) -> Iterator[str]:
    method, trl, speed, tuning = settings.method, settings.trl, settings.speed, settings.model.tuning
    low, high = method.beta.range
    if not (low <= settings.beta <= high or (settings.allow_beta and settings.beta > 0)):
        rule = f"beta must lie in [{low:g}, {high:g}] for method={method.name} ({method.beta.meaning})"
        grid = ", ".join(f"{value:g}" for value in method.beta.grid)
        yield f"{rule}, got {settings.beta:g}; its grid is {grid} (allow_beta=true if you mean it)"
    rate, limit = trl["learning_rate"], settings.model.max_learning_rate.for_tuning(tuning)
    if isinstance(rate, float) and not settings.allow_learning_rate and not 0 < rate <= limit:
        rule = f"trl.learning_rate must be above 0 and at most {limit:g} for model.tuning={tuning} on this model"
        usual = f"method={method.name} usually takes {method.learning_rate.for_tuning(tuning):g}"
        yield f"{rule}, got {rate:g}; {usual} (allow_learning_rate=true if you mean it)"
    yield from _loss_faults(settings)
    if speed.group_by_length is True and trl.get("train_sampling_strategy") == "sequential":
        order = "the order of rows, which this loss needs as it is (trl.train_sampling_strategy=sequential)"
        yield f"speed.group_by_length=true would change {order}: take auto"
    ours, theirs = speed.checkpointing, trl["gradient_checkpointing"]
    if ours != "auto" and theirs is not None and ours != theirs:
        both = f"speed.checkpointing={ours} and trl.gradient_checkpointing={theirs}"
        yield f"{both.lower()} contradict each other: set one of them"
    if method.rows == "prompts" and (fresh := trl["max_new_tokens"]) >= (trl["max_length"] or 0):
        rule = f"trl.max_length counts prompt and answer and must be above trl.max_new_tokens={fresh}"
        yield f"{rule}, got {trl['max_length']}"
    if method.rows == "prompts" and speed.group_by_length is True:
        unknown = f"the length of answers, which method={method.name} draws while it trains"
        yield f"speed.group_by_length=true needs {unknown}: take auto"
    if method.rows == "unary" and (batch := trl["per_device_train_batch_size"]) < 2:
        why = "both labels in every batch; 4 or more is better"
        yield f"trl.per_device_train_batch_size must be at least 2 for method={method.name} ({why}), got {batch}"
    if trl.get("sync_ref_model") and tuning != "full":
        needed = f"a reference model of its own, which model.tuning={tuning} has not"
        yield f"trl.sync_ref_model needs {needed}: use model.tuning=full or trl.sync_ref_model=false"


NEEDS_JUDGE = (
    "needs somebody to compare its answers: judge=reward_model judge.path=…, judge=llm judge.base_url=… judge.model=…, "
    "or judge.module=… with your own gold_rewards(prompts, answers)"
)


def _judge_faults(settings: Settings) -> Iterator[str]:
    draws, name, judge = settings.method.rows == "prompts", settings.method.name, settings.judge
    tool = "python -m dpo_kit data mode=build"
    if draws and judge is None:
        yield f"method={name} {NEEDS_JUDGE}"
    elif draws and judge.kind == "human":  # type: ignore[union-attr]
        remedy = f"take another judge, or train in rounds with {tool} judge=human and method=dpo"
        yield f"judge=human cannot answer while method={name} trains: {remedy}"
    elif judge is not None and not draws:
        remedy = f"leave it out, or take method=online_dpo; {tool} judge=… makes pairs"
        yield f"judge={judge.kind} has nothing to compare with method={name}, whose answers are given: {remedy}"


def _model_faults(model: Model) -> Iterator[str]:
    """Code from elsewhere runs only where the config names whose it is, and which."""
    start, reference = locate("model.path", model.path), locate("model.reference", model.reference or "")
    if model.trust_remote_code and start.is_dir():
        rule = "model.trust_remote_code=true needs a repository and its commit"
        remedy = "name the repository, model.path=org/name, or load a model whose code transformers has"
        yield f"{rule}, but model.path={model.path} is a folder: {remedy}"
    elif model.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        rule = "model.revision must be a full commit hash (40 hex digits) whose code you have read"
        yield f"model.trust_remote_code=true runs code of a repository, so {rule}, got {model.revision}"
    same = model.reference == model.path or (start.exists() and start.resolve() == reference.resolve())
    if model.tuning != "full" and model.reference and same:
        there = f"which model.tuning={model.tuning} has already (the policy with its adapter off)"
        remedy = "leave it out, and save a second model's memory"
        yield f"model.reference={model.reference} is the start itself, {there}: {remedy}"
    if model.tuning == "full" and model.dtype == "float16":
        why = "has too small a range to tune all weights in (after one step the policy is ruined)"
        yield f"model.dtype=float16 {why}: take model.dtype=auto, or model.tuning=lora"
    kernel = model.attn_implementation
    if kernel and "/" in kernel:
        asked = f"model.attn_implementation={kernel}"
        yield f"{asked} would download code and run it: take sdpa, eager or flash_attention_2"
    elif kernel not in (None, *ATTENTION):
        from dpo_kit.config.explain import wrong_choice

        yield wrong_choice("model.attn_implementation", kernel, ATTENTION)


def _loss_faults(settings: Settings) -> Iterator[str]:
    trl, smoothing, method = settings.trl, settings.trl.get("label_smoothing") or 0.0, settings.method.name
    losses = _losses(trl)
    named = ", ".join(losses)
    if not losses and "loss_type" in trl:
        yield f"trl.loss_type names no loss, got {trl['loss_type']!r}: leave it out, method={method} has its own"
        return
    if (CONF / "method" / f"{method}.yaml").exists() and losses != loss_of(method)[1]:
        from dpo_kit.config.explain import foreign_loss

        yield foreign_loss(method, losses)  # name, meaning of beta and findings would be those of the method's own loss
    smoothed = load_schema()["classes"][settings.method.config.rsplit(".", 1)[-1]]["smoothed_losses"]
    if smoothing and not set(losses) & set(smoothed):
        remedy = f"set it to 0, or take a loss that uses it ({', '.join(smoothed) or 'none of this trainer does'})"
        yield f"trl.label_smoothing={smoothing:g} has no effect on {named or 'this method'}: {remedy}"
    if not 0 <= smoothing < 0.5:
        yield f"trl.label_smoothing is the share of flipped labels and must lie in [0, 0.5), got {smoothing:g}"
    if "exo_pair" in losses and not smoothing:
        yield "trl.label_smoothing must be above 0 for exo_pair (its paper takes 1e-3), got 0"
    weights = trl.get("loss_weights")
    if weights is not None and len(weights) != len(losses):
        yield f"trl.loss_weights needs one weight per loss ({named}), got {weights}"


@cache
def loss_of(method: str) -> tuple[str, list[str]]:
    """TRL's config class of a method of ours, and its losses."""
    file = yaml.safe_load((CONF / "method" / f"{method}.yaml").read_text(encoding="utf-8"))
    above = str(file["defaults"][0])
    trained_by = above.removeprefix("/trl/") if above.startswith("/") else loss_of(above)[0]
    return trained_by, _losses(file.get("trl") or {})


def _losses(trl: dict[str, Any]) -> list[str]:
    given = trl.get("loss_type") or []
    return [str(loss) for loss in (given if isinstance(given, list) else [given])]
