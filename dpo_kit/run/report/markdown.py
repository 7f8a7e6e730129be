"""Texts from elsewhere inside Markdown pages: what stands in them is shown and does nothing; secrets are redacted."""

import re
from collections.abc import Iterable, Sequence

from dpo_kit.run.redact import redact_text

# An underscore inside a word and a bracket that no link follows do nothing: left alone, commands stay readable.
_ACTIVE = re.compile(r"[\\`*<>|#&~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])")


def inline(text: str) -> str:
    """`text` in one line, with every character that Markdown or HTML would act on escaped."""
    return _ACTIVE.sub(r"\\\g<0>", " ".join(redact_text(text).split()))


def code(text: str) -> str:
    """`text` in one line of code, also inside a table."""
    clean = " ".join(redact_text(text).split()).replace("|", "¦")
    bar = "`" * (1 + _longest_run(clean))
    space = " " if clean.startswith("`") or clean.endswith("`") else ""
    return f"{bar}{space}{clean}{space}{bar}"


def fence(text: str, language: str = "text") -> str:
    """`text` as a block of code whose fence is longer than any run of backticks in it."""
    clean = redact_text(text).replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")
    bar = "`" * max(3, 1 + _longest_run(clean))
    return f"{bar}{language}\n{clean}\n{bar}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table of cells that are Markdown already; the columns after the first `left` are aligned to the right."""
    rule = ["---" if number < left else "---:" for number in range(len(headings))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows))


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
