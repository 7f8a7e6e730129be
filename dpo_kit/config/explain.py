"""Why a config is refused, in our words: which key was meant, and what to type instead. Loaded where one is refused."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra.errors import MissingConfigException
from omegaconf.errors import MissingMandatoryValue

from dpo_kit.config.compose import CONF, SET_ELSEWHERE, fields_of, loss_of
from dpo_kit.config.limits import missing_package
from dpo_kit.config.settings import GoldJudge, HumanJudge, LLMJudge, RewardModelJudge, Settings, Strict
from dpo_kit.config.trl_schema import load_schema
from dpo_kit.errors import ConfigError, did_you_mean
from dpo_kit.run.other_tools import meant
from dpo_kit.run.words import override, quote

GONE_FROM_TRL = {
    "max_prompt_length": "max_length",
    "max_target_length": "max_length",
    "warmup_ratio": "warmup_steps (below 1 it is a share of the run)",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy",
    "rpo_alpha": "method=dpo_sft with trl.loss_weights",
    "reference_free": "method=simpo or method=cpo",
    "tokenizer": "model.path",
    "torch_dtype": "model.dtype",
}
JUDGES: tuple[type[Strict], ...] = (GoldJudge, RewardModelJudge, LLMJudge, HumanJudge)
OF_YOUR_OWN = {"model": "model=local model.path", "data": "data=jsonl data.train"}  # what is typed with a path


def explain(error: Exception, words: Sequence[str] = ()) -> ConfigError:
    """Hydra's and OmegaConf's errors in our words: what of `words` was refused, and the near miss."""
    text = str(error)
    if "hydra/launcher/submitit_" in text:
        return ConfigError(missing_package("hydra/launcher=slurm", "hydra_plugins.hydra_submitit_launcher") or text)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        place = str(error.missing_cfg_file)  # group/option
        group, _, option = place.rpartition("/") if place.startswith("hydra/") else place.partition("/")
        options = error.options or sorted(file.stem for file in (CONF / group).glob("*.yaml"))
        own = f"; of your own: {override(OF_YOUR_OWN[group], option)}" if option and group in OF_YOUR_OWN else ""
        return ConfigError(wrong_choice(group, option, options) + own)
    if named := re.search(r"An item is already at '([^']+)'", text):
        return ConfigError(f"{named[1]} exists already: leave out the +")
    if named := re.search(r"Could not (?:override|append to config|delete from config|find)[^']*'([^']+)'", text):
        return ConfigError(unknown_key(named[1].split("@")[0], known_keys(), words))
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{error.full_key} is missing: add {error.full_key}=…")
    if named := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'\n", text):
        one, several, listed = (f"{named[1]}={value}" for value in (quote(named[2]), named[2], f"[{named[2]}]"))
        which = f"the list {listed} or the one text {one}"
        return ConfigError(
            f"{several} is several values: add -m for a run of each (--multirun), or say which is meant, {which}"
        )
    says_which = any(word.lstrip("+~").partition("=")[0] in text for word in words)
    return ConfigError(text if says_which or not words else f"{' '.join(words)}: {text}")


def wrong_choice(key: str, value: Any, choices: Iterable[Any]) -> str:
    """What is said of a value that is none of `choices`."""
    names = [str(choice) for choice in choices]
    same = [name for name in names if name.lower() == str(value).lower()]
    longer = same or [name for name in names if value and name.startswith(str(value).lower())]
    meant = f"; did you mean {' or '.join(longer[:3])}?" if longer else did_you_mean(str(value), names)
    return f"{key} must be one of {', '.join(names)}, got {value!r}{meant}"


def unknown_key(key: str, known: Iterable[str], words: Sequence[str] = ()) -> str:
    """Why `key` is refused and what was probably meant; `words` are those of the command line, with its value."""
    name, known = key.removeprefix("trl."), list(known)
    typed = [word.lstrip("+~").partition("=") for word in words]
    value = next((value for given, _, value in typed if given == key), "")
    if name in SET_ELSEWHERE:
        return f"{key} is set elsewhere: use {SET_ELSEWHERE[name]}"
    if name in GONE_FROM_TRL:
        return f"{key} is gone from TRL: use {GONE_FROM_TRL[name]}"
    owners = [cls for cls, it in load_schema()["classes"].items() if key.startswith("trl.") and name in it["fields"]]
    if owners:
        return f"{key} belongs to {', '.join(owners)}, not to the config class of the chosen method"
    if key.startswith("model.lora."):
        return f"{key} is not among the usual options of peft.LoraConfig: add it with +{key}=… if PEFT knows it"
    if key in known:
        group = key.partition(".")[0]
        return f"{key} belongs to an option of the group {group} that is not chosen here: add {group}=…"
    if (ours := meant(key)) and (ours in known or ours.startswith(("hydra.", "model.lora."))):
        ours = next((form for form in OF_YOUR_OWN.values() if form.endswith(f" {ours}")), ours)  # with its option
        return f"unknown key {key}; did you mean {override(ours, value) if value else ours}?"
    tail = key.rpartition(".")[2]
    near = sorted((word for word in known if word.rpartition(".")[2] == tail and word != key), reverse=True)
    near = near or [word for word in known if "." not in key and word.startswith(key.lower())]
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else did_you_mean(key, known, count=2, cutoff=0.7)
    return f"unknown key {key}{hint}"


def known_keys() -> list[str]:
    """Every key that some config may have, for near misses."""
    groups = [entry.name for entry in CONF.iterdir() if entry.is_dir() and entry.name not in ("hydra", "trl")]
    of_trl = {field for it in load_schema()["classes"].values() for field in fields_of(it)}
    of_judges = {f"judge.{name}" for kind in JUDGES for name in kind.model_fields}
    return sorted({*groups, *_model_keys(Settings), *of_trl, *of_judges})


def _model_keys(model: type[Strict], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Strict):
            yield from _model_keys(field.annotation, f"{prefix}{name}.")


def foreign_loss(method: str, losses: list[str]) -> str:
    """What is said of `losses` that are not those of `method`: the method that has them, or how to make one."""
    given, wanted = f"trl.loss_type={losses[0] if len(losses) == 1 else losses}", (loss_of(method)[0], losses)
    files = sorted((CONF / "method").glob("*.yaml"))
    if other := next((file.stem for file in files if loss_of(file.stem) == wanted), None):
        return f"{given} is method={other}, whose beta has its own meaning and range: say method={other}"
    return (
        f"{given} is not the loss of method={method}: give it a name of its own, in a file DIR/method/{losses[0]}.yaml "
        f"with `# @package _global_`, `defaults: [{method}, _self_]`, `method: {{name: {losses[0]}}}` and "
        f"`trl: {{loss_type: [{','.join(losses)}]}}`, and say --config-dir DIR method={losses[0]}"
    )


KINDS = ("gold", "reward_model", "llm", "human", "local", "server")  # by which pydantic tells judges and answers apart


def describe_fault(fault: Any, known: Iterable[str] | None = None) -> str:
    """What pydantic refuses (one of `errors()`): key, rule, value, near miss among `known` keys (None: a run's)."""
    parts = [str(part) for part in fault["loc"]]
    key = ".".join(part for part in parts if part not in KINDS or parts[0] not in ("judge", "build"))
    if fault["type"] == "extra_forbidden":
        ours = known_keys() if parts[0] == "judge" else _model_keys(Settings)
        return unknown_key(key, ours if known is None else known)
    if fault["type"] == "missing":
        return f"{key} is missing: add {key}=…"
    rule = fault["msg"].removeprefix("Value error, ")
    if rule.startswith(f"{key}."):  # of several keys of a group: says all itself
        return rule
    choices = re.findall(r"'([^']+)'", str(fault.get("ctx", {}).get("expected", "")))
    meant = did_you_mean(str(fault["input"]), choices)
    return f"{key}: {rule[0].lower()}{rule[1:]}, got {fault['input']!r:.80}{meant}"
