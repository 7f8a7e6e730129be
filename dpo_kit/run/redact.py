"""Keep secret values out of everything that is written or sent. Standard library only.

A value is taken for a secret when its key says so (`hub_token`, `api_key`, `password`, ...), when its shape does
(`SHAPES`, credentials in a URL), or when it is the value of an environment variable with such a name. Names of
environment variables (`api_key_env`) and special tokens (`pad_token`) are no secrets. A config or a command line that
holds one is refused before anything is written; texts from elsewhere are redacted.
"""

import logging
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

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
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

# What has 40 hex digits may be a W&B key or a commit: a word before it, or a path around it, tells that it is a commit.
COMMIT_KEY = re.compile(r"(revision|commit|sha|sha1|hash|fingerprint|digest|checksum|blob|tree|git)$", re.IGNORECASE)
HEX40 = re.compile(
    r"(?P<commit>(?:revision|commit|sha1?|hash|fingerprint|digest)[\"']?\s{0,2}[:= ]\s{0,2}[\"']?)?"
    r"(?<![\w/@.\-])(?P<key>[0-9a-f]{40})(?![\w/])",
    re.IGNORECASE,
)
SHAPES = re.compile(
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
ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([\w.]+)")  # in a config
_PLAIN_WORD = re.compile(r"/|.{0,7}$|[a-z]{0,11}$")  # found in any text: true, disabled, a path
URL_USER = re.compile(r"(?<=://)[^\s/@?#]+(?=@)")
URL_QUERY = re.compile(
    r"(?<=[?&])((?:[\w\-]*(?:token|key|secret|password|signature|credential)|sig)=)[^&\s#\"']+", re.IGNORECASE
)


@lru_cache(maxsize=10_000)
def is_secret_key(key: str) -> bool:
    """Whether the last part of `key` (`model.hub_token`) names a secret rather than a setting."""
    key = CAMEL.sub("_", key)
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
    return redact_text(value, commits=bool(COMMIT_KEY.search(key))) if isinstance(value, str) else value


def redact_text(text: str, *, commits: bool = False) -> str:
    """`text` without token shapes, URL credentials, secrets of the environment; `commits`: 40 hex digits stay."""
    for value in environment_secrets():
        text = text.replace(value, REDACTED)
    text = SHAPES.sub(REDACTED, text)
    text = URL_QUERY.sub(rf"\1{REDACTED}", URL_USER.sub(REDACTED, text))
    return text if commits else HEX40.sub(redact_hex, text)


def redact_hex(match: re.Match[str]) -> str:
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


def refuse_secrets(config: Any, argv: Sequence[str] = ()) -> None:
    """ConfigError where a composed config (plain containers, interpolations as written or resolved) or a command line
    holds a secret: the key, why, and where it belongs instead. The value is never repeated.
    """
    written = f"{config} {' '.join(argv)}"
    copied = any(is_secret_key(name) for name in ENVIRONMENT.findall(written))
    if copied or REDACTED in written or redact(config) != config or redact_argv(argv) != list(argv):
        from dpo_kit.run.secrets import refuse_named

        refuse_named(config, argv)
