"""Keep secret values out of everything that is written or sent. Pure; standard library only.

A value is taken for a secret when its key says so (`hub_token`, `api_key`, `password`, ...) or when its shape does
(Hugging Face, OpenAI and Anthropic, W&B, AWS, GitHub, GitLab, Slack, Google keys, JSON web tokens, private keys,
credentials in a URL). Names of environment variables (`api_key_env`) and special tokens (`pad_token`) are no secrets.
"""

import re
from collections.abc import Sequence
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
_URL_USER = re.compile(r"(?<=://)[^\s/@?#]+(?=@)")
_URL_QUERY = re.compile(
    r"(?<=[?&])((?:[\w\-]*(?:token|key|secret|password|signature|credential)|sig)=)[^&\s#\"']+", re.IGNORECASE
)


def is_secret_key(key: str) -> bool:
    """Whether the last part of `key` (`model.hub_token`) names a secret rather than a setting."""
    key = _CAMEL.sub("_", key)
    return bool(_SECRET_KEY.search(key)) and not _SPECIAL_TOKEN.search(key)


def redact(value: Any, key: str = "") -> Any:
    """`value` (nested dicts, lists, scalars) as plain containers with every secret replaced by `<redacted>`.

    Under a secret-named key every string goes, and so does a number where the key names a password; under any other
    key what looks like a token does.
    """
    if isinstance(value, dict):
        return {_redact_key(k): redact(v, key if is_secret_key(key) else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item, key) for item in value]
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value in (None, "") or isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    if is_secret_key(key) and (isinstance(value, str) or not key.lower().endswith(("token", "tokens"))):
        return REDACTED
    return _redact_text(value, commits=bool(_COMMIT_KEY.search(key))) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """`text` with known token shapes and the credentials of URLs replaced by `<redacted>`."""
    return _redact_text(text, commits=False)


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


def _redact_key(key: Any) -> Any:
    return redact_text(key) if isinstance(key, str) else key


def _redact_text(text: str, *, commits: bool) -> str:
    text = _SHAPES.sub(REDACTED, text)
    text = _URL_QUERY.sub(rf"\1{REDACTED}", _URL_USER.sub(REDACTED, text))
    return text if commits else _HEX40.sub(_redact_hex, text)


def _redact_hex(match: re.Match[str]) -> str:
    return match.group() if match["commit"] else REDACTED
