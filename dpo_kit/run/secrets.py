"""Why a value is taken for a secret, and where it belongs instead (secrets.yaml)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_kit.errors import ConfigError
from dpo_kit.run import redact as rules
from dpo_kit.run.files import texts

STORES: dict[str, str] = texts(__file__)  # by whose secret it is
_SHAPE_STORES = {"hf_": "hf", "api_org_": "hf", "wandb_": "wandb", "local-": "wandb", "sk-ant-": "anthropic"}
_SHAPE_STORES |= {"sk-": "openai", "AKIA": "aws", "ASIA": "aws", "gh": "github"}
_URL, _SHAPE = "it is a URL with credentials", "it has the shape of a key"
Secret = tuple[str, str]  # the key under which it stands, why it is taken for one; never its value


def refuse_named(config: Any, argv: Sequence[str]) -> None:
    """ConfigError that names each secret of `config` and `argv` by its key (see `refuse_secrets`)."""
    secrets = [*_in_config(config, "")]
    for word, clean in zip(argv, rules.redact_argv(argv), strict=True):
        name, _, value = word.partition("=")
        name = rules.redact_text(name.lstrip("-+~"))
        if reason := _reason(value, name.replace("-", "_")):
            secrets.append((name, reason))
        elif clean != word:
            secrets.append(("the command line", _shape(word, "") or "a word after a secret-named option"))
    if secrets:
        lines = {
            f"{key}: {reason}, and it would be written to the run directory; instead, {_remedy(key, reason)}"
            for key, reason in secrets
        }
        raise ConfigError("\n".join(sorted(lines)))


def _in_config(value: Any, key: str) -> Iterator[Secret]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if rules.redact_text(str(name)) != str(name):
                yield key or "config", "a key of it is a secret itself"
            yield from _in_config(item, key if rules.is_secret_key(key) else f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _in_config(item, key)
    elif reason := _reason(value, key):
        yield key, reason


def _reason(value: Any, key: str) -> str | None:
    """Why the scalar `value` under `key` is a secret; None where it is not."""
    if isinstance(value, str):
        if named := [name for name in rules.ENVIRONMENT.findall(value) if rules.is_secret_key(name)]:
            return f"it copies the environment variable {named[0]} into the config"
        if shape := _shape(value, key):
            return shape
        if any(secret in value for secret in rules.environment_secrets()):
            return "it holds the value of an environment variable that is named like a secret"
    return "its name says that it is a secret" if rules.redact(value, key) == rules.REDACTED else None


def _shape(text: str, key: str) -> str | None:
    if match := rules.SHAPES.search(text):
        return _SHAPE + next((f" ({start}…)" for start in _SHAPE_STORES if match.group().startswith(start)), "")
    if rules.URL_USER.search(text) or rules.URL_QUERY.search(text):
        return _URL
    is_commit = rules.COMMIT_KEY.search(key) or rules.HEX40.sub(rules.redact_hex, text) == text
    return None if is_commit else f"{_SHAPE} (40 hex digits)"


def _remedy(key: str, reason: str) -> str:
    """Where the secret belongs, by what its shape or its key says of its owner."""
    shape = re.search(r"\((\S+)…\)", reason)
    words = [_SHAPE_STORES[shape[1]]] if shape else re.split(r"[._\-]", rules.CAMEL.sub("_", key).lower())
    known = [STORES[word] for word in (["url"] if reason == _URL else words) if word in STORES]
    return [*known, "hand it over in an environment variable, or in the store of the program that needs it"][0]
