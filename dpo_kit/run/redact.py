"""Keep secret values out of everything that is written or sent. Standard library only.

A value is taken for a secret when its key says so (`hub_token`, `api_key`, `password`, ...), when its shape does
(`_SHAPES`, credentials in a URL), or when it is the value of an environment variable with such a name. Names of
environment variables (`api_key_env`) and special tokens (`pad_token`) are no secrets. A config or a command line that
holds one is refused before anything is written; texts from elsewhere are redacted.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from dpo_kit.errors import ConfigError

REDACTED = "<redacted>"

_SECRET_KEY = re.compile(
    r"(^|[_.\-])(token|pass(word|wd|phrase)|secret|credential|bearer|authorization|cookie"
    r"|(api|access|private|secret|auth|session|signing|encryption)_?key|apikey|auth)s?$",
    re.IGNORECASE,
)
_SPECIAL_TOKEN = re.compile(
    r"(^|[_.\-])(pad|eos|bos|unk|sep|cls|mask|image|video|audio|special|stop|begin|end|start|suppress|forced|new|num)"
    r"(_of_\w+|_sequence)?_tokens?$",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

# What has 40 hex digits may be a W&B key or a commit: a word before it, or a path around it, tells that it is a commit.
_COMMIT_KEY = re.compile(r"(revision|commit|sha|sha1|hash|fingerprint|digest|checksum|blob|tree|git)$", re.IGNORECASE)
_HEX40 = re.compile(
    r"(?P<commit>(?:revision|commit|sha1?|hash|fingerprint|digest)[\"']?\s{0,2}[:= ]\s{0,2}[\"']?)?"
    r"(?<![\w/@.\-])(?P<key>[0-9a-f]{40})(?![\w/])",
    re.IGNORECASE,
)
_SHAPES = re.compile(
    r"""
      \b(?:hf|api_org)_[A-Za-z0-9]{16,}                                # Hugging Face
    | \bsk-[A-Za-z0-9_\-]{16,}                                         # OpenAI, Anthropic
    | \bwandb_v\d+_\w{20,} | (?<![\w/.])(?=\w*\d)\w{86}(?!\w)             # W&B, 86 characters
    | (?<![\w/])local-[0-9a-f]{40}\b                                   # W&B on premises
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b                                    # AWS access key id
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_[A-Za-z0-9_]{20,}    # GitHub
    | \bglpat-[A-Za-z0-9_\-]{16,}                                      # GitLab
    | \bxox[abprs]-[A-Za-z0-9\-]{10,}                                  # Slack
    | \bAIza[0-9A-Za-z_\-]{35}                                         # Google
    | \beyJ[\w\-]{8,}\.eyJ[\w\-]{8,}\.[\w\-]+                          # JSON web token
    | (?<=[Bb]earer[ ])[\w\-.~+/=]{8,}                                 # Authorization header
    | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----[\s\S]*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)
    """,
    re.VERBOSE,
)
_PLAIN_WORD = re.compile(r"/|.{0,7}$|[a-z]{0,11}$")  # found in any text: true, disabled, a path
_URL_USER = re.compile(r"(?<=://)[^\s/@?#]+(?=@)")
_URL_QUERY = re.compile(
    r"(?<=[?&])((?:[\w\-]*(?:token|key|secret|password|signature|credential)|sig)=)[^&\s#\"']+", re.IGNORECASE
)


@lru_cache(maxsize=10_000)
def is_secret_key(key: str) -> bool:
    """Whether the last part of `key` (`model.hub_token`) names a secret rather than a setting."""
    key = _CAMEL.sub("_", key)
    return bool(_SECRET_KEY.search(key)) and not _SPECIAL_TOKEN.search(key)


def environment_secrets() -> list[str]:
    """Values of environment variables whose name says that they are secret, longest first; no paths, no plain words."""
    values = {value for name, value in os.environ.items() if is_secret_key(name) and not _PLAIN_WORD.match(value)}
    return sorted(values, key=len, reverse=True)


def redact(value: Any, key: str = "") -> Any:
    """`value` (nested dicts, lists, scalars) as plain containers with every secret replaced by `<redacted>`. Under a
    secret-named key every string goes, and so does a number where the key names a password and no count of tokens
    (`num_tokens: 7`, `max_tokens=7,8`); under any other key what looks like a token does.
    """
    if isinstance(value, dict):
        return {
            redact_text(name) if isinstance(name, str) else name: redact(item, key if is_secret_key(key) else str(name))
            for name, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item, key) for item in value]
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value in (None, "") or isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    if isinstance(value, str):
        counted = key.lower().endswith("tokens") and value.replace(",", "").isdecimal()
    else:
        counted = key.lower().endswith(("token", "tokens"))
    if is_secret_key(key) and not counted:
        return REDACTED
    return redact_text(value, commits=bool(_COMMIT_KEY.search(key))) if isinstance(value, str) else value


def redact_text(text: str, *, commits: bool = False) -> str:
    """`text` without token shapes, URL credentials, secrets of the environment; `commits`: 40 hex digits stay."""
    for value in environment_secrets():
        text = text.replace(value, REDACTED)
    text = _SHAPES.sub(REDACTED, text)
    text = _URL_QUERY.sub(rf"\1{REDACTED}", _URL_USER.sub(REDACTED, text))
    return text if commits else _HEX40.sub(_redact_hex, text)


def _redact_hex(match: re.Match[str]) -> str:
    return match.group() if match["commit"] else REDACTED


def redact_argv(argv: Sequence[str]) -> list[str]:
    """A command line without its secrets: `hub.token=x`, `--token x`, `--token=x` and known token shapes."""
    clean: list[str] = []
    for word in argv:
        previous = clean[-1] if clean else ""
        name, equals, value = word.partition("=")
        if previous.startswith("--") and "=" not in previous and is_secret_key(previous.lstrip("-").replace("-", "_")):
            clean.append(REDACTED)
        elif equals:
            clean.append(f"{redact_text(name)}={redact(value, name.lstrip('-+~').replace('-', '_'))}")
        else:
            clean.append(redact_text(word))
    return clean


def redact_command(text: str) -> str:
    """A command line in one piece, as `redact_argv` leaves it."""
    return " ".join(redact_argv(text.split()))


class RedactingFormatter(logging.Formatter):
    """Log lines without secrets, those of libraries and their tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


# --- refusing ----------------------------------------------------------------------------------------------------


STORES = {
    "hf": "run `hf auth login`, or set HF_TOKEN in the environment",
    "hub": "run `hf auth login`, or set HF_TOKEN in the environment",
    "wandb": "run `wandb login`, or set WANDB_API_KEY in the environment",
    "openai": "set OPENAI_API_KEY in the environment",
    "anthropic": "set ANTHROPIC_API_KEY in the environment",
    "aws": "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment",
    "github": "use git's credential helper",
    "url": "leave user and password out of the address: git, pip and curl read them from their own stores (~/.netrc)",
}
_SHAPE_STORES = {"hf_": "hf", "api_org_": "hf", "wandb_": "wandb", "local-": "wandb", "sk-ant-": "anthropic"}
_SHAPE_STORES |= {"sk-": "openai", "AKIA": "aws", "ASIA": "aws", "gh": "github"}
_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([\w.]+)")
_URL, _SHAPE = "it is a URL with credentials", "it has the shape of a key"
Secret = tuple[str, str]  # the key under which it stands, why it is taken for one; never its value


def refuse_secrets(config: Any, argv: Sequence[str] = ()) -> None:
    """ConfigError where a composed config (plain containers, interpolations as written or resolved) or a command line
    holds a secret: the key, why, and where it belongs instead. The value is never repeated.
    """
    secrets = [*_in_config(config, "")]
    for word, clean in zip(argv, redact_argv(argv), strict=True):
        name, _, value = word.partition("=")
        name = redact_text(name.lstrip("-+~"))
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
            if redact_text(str(name)) != str(name):
                yield key or "config", "a key of it is a secret itself"
            yield from _in_config(item, key if is_secret_key(key) else f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _in_config(item, key)
    elif reason := _reason(value, key):
        yield key, reason


def _reason(value: Any, key: str) -> str | None:
    """Why the scalar `value` under `key` is a secret; None where it is not."""
    if isinstance(value, str):
        if named := [name for name in _ENVIRONMENT.findall(value) if is_secret_key(name)]:
            return f"it copies the environment variable {named[0]} into the config"
        if shape := _shape(value, key):
            return shape
        if any(secret in value for secret in environment_secrets()):
            return "it holds the value of an environment variable that is named like a secret"
    return "its name says that it is a secret" if redact(value, key) == REDACTED else None


def _shape(text: str, key: str) -> str | None:
    if match := _SHAPES.search(text):
        return _SHAPE + next((f" ({start}…)" for start in _SHAPE_STORES if match.group().startswith(start)), "")
    if _URL_USER.search(text) or _URL_QUERY.search(text):
        return _URL
    is_commit = _COMMIT_KEY.search(key) or _HEX40.sub(_redact_hex, text) == text
    return None if is_commit else f"{_SHAPE} (40 hex digits)"


def _remedy(key: str, reason: str) -> str:
    """Where the secret belongs, by what its shape or its key says of its owner."""
    shape = re.search(r"\((\S+)…\)", reason)
    words = [_SHAPE_STORES[shape[1]]] if shape else re.split(r"[._\-]", _CAMEL.sub("_", key).lower())
    known = [STORES[word] for word in (["url"] if reason == _URL else words) if word in STORES]
    return [*known, "hand it over in an environment variable, or in the store of the program that needs it"][0]
