"""From overrides to a checked config, without importing torch or trl.

`compose` builds the config from conf/ as Hydra does; `check` refuses what cannot train as meant and returns it typed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pydantic
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dpo_kit.config.best_metric import selection_faults
from dpo_kit.config.limits import checked_value, idle_faults, library_faults, wrong_choice
from dpo_kit.config.places import locate
from dpo_kit.config.settings import Callbacks, Model, Rates, Settings
from dpo_kit.config.trl_schema import load_schema
from dpo_kit.errors import ConfigError
from dpo_kit.run.redact import refuse_secrets
from dpo_kit.run.words import readable

PACKAGE = Path(__file__).resolve().parents[1]
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
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    cfg = compose_unchecked([*search, *overrides])
    refuse_idle(check(cfg), overrides)
    return cfg


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
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        from dpo_kit.config.explain import explain

        raise explain(error) from error
    refuse_secrets(values)
    judge = values.get("judge") or {}  # type: ignore[union-attr]
    if judge.get("kind") == "gold" and judge.get("module") is None:  # the default, which data of one's own do not have
        raise ConfigError(f"data.gold is null, and method={cfg.method.name} {NEEDS_JUDGE}")
    try:
        settings = Settings(**values)  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        from dpo_kit.config.explain import describe_fault

        raise ConfigError("\n".join(map(describe_fault, error.errors()))) from error
    faults = [*_trl_faults(settings)]  # the others rely on types
    if not faults:
        faults = [*_method_faults(settings), *_model_faults(settings.model)]
        faults += _judge_faults(settings) if trains else []
    faults = faults or [*library_faults(settings), *selection_faults(settings), *_own_faults(settings.callbacks)]
    if faults:
        raise ConfigError("\n".join(faults))
    return settings


def _own_faults(callbacks: Callbacks) -> Iterable[str]:
    """Why measures and callbacks of the user's own could not be called; where none is named, nothing is loaded."""
    if not (callbacks.metrics or callbacks.sample_metrics or callbacks.extra):
        return ()
    from dpo_kit.config.extensions import own_faults

    return own_faults(callbacks)


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
        if settings.trl[key] not in (value, [value]):
            yield f"trl.{key} follows {key}: say {key}={settings.trl[key]} instead of trl.{key}={settings.trl[key]}"


def fields_of(described: dict[str, Any]) -> list[str]:
    return [f"trl.{key}" for key in described["fields"] if key not in SET_ELSEWHERE]


# --- faults of the method as a whole -----------------------------------------------------------------------------


def _method_faults(settings: Settings) -> Iterator[str]:
    method, trl = settings.method, settings.trl
    low, high = method.beta.range
    if not (low <= settings.beta <= high or (settings.allow_beta and settings.beta > 0)):
        grid = ", ".join(f"{value:g}" for value in method.beta.grid)
        yield (
            f"beta must lie in [{low:g}, {high:g}] for method={method.name} ({method.beta.meaning}), "
            f"got {settings.beta:g}; its grid is {grid} (allow_beta=true if you mean it)"
        )
    rate, tuning = trl["learning_rate"], settings.model.tuning
    limit = settings.model.max_learning_rate.for_tuning(tuning)
    if isinstance(rate, float) and not settings.allow_learning_rate and not 0 < rate <= limit:
        usual = method.learning_rate.for_tuning(tuning)
        yield (
            f"trl.learning_rate must be above 0 and at most {limit:g} for model.tuning={tuning} on this model, "
            f"got {rate:g}; method={method.name} usually takes {usual:g} (allow_learning_rate=true if you mean it)"
        )
    yield from _loss_faults(settings)
    if settings.speed.group_by_length is True and trl.get("train_sampling_strategy") == "sequential":
        yield (
            "speed.group_by_length=true would change the order of rows, which this loss needs as it is "
            "(trl.train_sampling_strategy=sequential): take auto"
        )
    ours, theirs = settings.speed.checkpointing, trl["gradient_checkpointing"]
    if ours != "auto" and theirs is not None and ours != theirs:
        both = f"speed.checkpointing={ours} and trl.gradient_checkpointing={theirs}"
        yield f"{both.lower()} contradict each other: set one of them"
    if method.rows == "prompts" and trl["max_new_tokens"] >= (trl["max_length"] or 0):
        yield (
            f"trl.max_length counts prompt and answer and must be above trl.max_new_tokens={trl['max_new_tokens']}, "
            f"got {trl['max_length']}"
        )
    if method.rows == "prompts" and settings.speed.group_by_length is True:
        yield (
            f"speed.group_by_length=true needs the length of answers, which method={method.name} draws while it "
            "trains: take auto"
        )
    if method.rows == "unary" and trl["per_device_train_batch_size"] < 2:
        yield (
            f"trl.per_device_train_batch_size must be at least 2 for method={method.name} (both labels in every "
            f"batch; 4 or more is better), got {trl['per_device_train_batch_size']}"
        )
    if trl.get("sync_ref_model") and tuning != "full":
        yield (
            f"trl.sync_ref_model needs a reference model of its own, which model.tuning={tuning} has not: use "
            "model.tuning=full or trl.sync_ref_model=false"
        )


NEEDS_JUDGE = (
    "needs somebody to compare its answers: judge=reward_model judge.path=…, judge=llm judge.base_url=… judge.model=…, "
    "or judge.module=… with your own gold_rewards(prompts, answers)"
)


def _judge_faults(settings: Settings) -> Iterator[str]:
    method, judge = settings.method, settings.judge
    if method.rows != "prompts":
        if judge is not None:
            yield (
                f"judge={judge.kind} has nothing to compare with method={method.name}, whose answers are given: leave "
                "it out, or take method=online_dpo; python -m dpo_kit data mode=build judge=… makes pairs"
            )
    elif judge is None:
        yield f"method={method.name} {NEEDS_JUDGE}"
    elif judge.kind == "human":
        yield (
            f"judge=human cannot answer while method={method.name} trains: take another judge, or train in rounds with "
            "python -m dpo_kit data mode=build judge=human and method=dpo"
        )


def _model_faults(model: Model) -> Iterator[str]:
    """Code from elsewhere runs only where the config names whose it is, and which."""
    start = locate("model.path", model.path)
    if model.trust_remote_code and start.is_dir():
        yield (
            f"model.trust_remote_code=true needs a repository and its commit, but model.path={model.path} is a folder: "
            "name the repository, model.path=org/name, or load a model whose code transformers has"
        )
    elif model.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        yield (
            "model.trust_remote_code=true runs code of a repository, so model.revision must be a full commit hash "
            f"(40 hex digits) whose code you have read, got {model.revision}"
        )
    reference = locate("model.reference", model.reference or "")
    same = model.reference == model.path or (start.exists() and start.resolve() == reference.resolve())
    if model.tuning != "full" and model.reference and same:
        yield (
            f"model.reference={model.reference} is the start itself, which model.tuning={model.tuning} has already "
            "(the policy with its adapter off): leave it out, and save a second model's memory"
        )
    if model.tuning == "full" and model.dtype == "float16":
        yield (
            "model.dtype=float16 has too small a range to tune all weights in (after one step the policy is ruined): "
            "take model.dtype=auto, or model.tuning=lora"
        )
    if model.attn_implementation and "/" in model.attn_implementation:
        yield (
            f"model.attn_implementation={model.attn_implementation} would download code and run it: take sdpa, eager "
            "or flash_attention_2"
        )
    elif model.attn_implementation not in (None, *ATTENTION):
        yield wrong_choice("model.attn_implementation", model.attn_implementation, ATTENTION)


def _loss_faults(settings: Settings) -> Iterator[str]:
    trl, smoothing, method = settings.trl, settings.trl.get("label_smoothing") or 0.0, settings.method.name
    losses = _losses(trl)
    if not losses and "loss_type" in trl:
        yield f"trl.loss_type names no loss, got {trl['loss_type']!r}: leave it out, method={method} has its own"
        return
    if (CONF / "method" / f"{method}.yaml").exists() and losses != _loss_of(method)[1]:
        yield _foreign_loss(method, losses)
    smoothed = load_schema()["classes"][settings.method.config.rsplit(".", 1)[-1]]["smoothed_losses"]
    if smoothing and not set(losses) & set(smoothed):
        yield (
            f"trl.label_smoothing={smoothing:g} has no effect on {', '.join(losses) or 'this method'}: set it to 0, or "
            f"take a loss that uses it ({', '.join(smoothed) or 'none of this trainer does'})"
        )
    if not 0 <= smoothing < 0.5:
        yield f"trl.label_smoothing is the share of flipped labels and must lie in [0, 0.5), got {smoothing:g}"
    if "exo_pair" in losses and not smoothing:
        yield "trl.label_smoothing must be above 0 for exo_pair (its paper takes 1e-3), got 0"
    weights = trl.get("loss_weights")
    if weights is not None and len(weights) != len(losses):
        yield f"trl.loss_weights needs one weight per loss ({', '.join(losses)}), got {weights}"


def _foreign_loss(method: str, losses: list[str]) -> str:
    """Why a method of ours may not take another loss: name, meaning of beta and findings would be those of its own."""
    typed = f"trl.loss_type={losses[0] if len(losses) == 1 else losses}"
    wanted = (_loss_of(method)[0], losses)
    if others := [file.stem for file in sorted((CONF / "method").glob("*.yaml")) if _loss_of(file.stem) == wanted]:
        return f"{typed} is method={others[0]}, whose beta has its own meaning and range: say method={others[0]}"
    return (
        f"{typed} is not the loss of method={method}: give it a name of its own, in a file DIR/method/{losses[0]}.yaml "
        f"with `# @package _global_`, `defaults: [{method}, _self_]`, `method: {{name: {losses[0]}}}` and "
        f"`trl: {{loss_type: [{','.join(losses)}]}}`, and say --config-dir DIR method={losses[0]}"
    )


@cache
def _loss_of(method: str) -> tuple[str, list[str]]:
    """TRL's config class of a method of ours, and its losses."""
    file = yaml.safe_load((CONF / "method" / f"{method}.yaml").read_text(encoding="utf-8"))
    above = str(file["defaults"][0])
    trained_by = above.removeprefix("/trl/") if above.startswith("/") else _loss_of(above)[0]
    return trained_by, _losses(file.get("trl") or {})


def _losses(trl: dict[str, Any]) -> list[str]:
    given = trl.get("loss_type") or []
    return [str(loss) for loss in (given if isinstance(given, list) else [given])]
