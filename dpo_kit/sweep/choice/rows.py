"""The rows of a sweep's table: one per run with what it measured at its end; as CSV, Markdown and in the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from dpo_kit.run.measures import FLOOR, KL_FLOOR
from dpo_kit.run.report.markdown import inline, table
from dpo_kit.run.report.numbers import number_text, range_text
from dpo_kit.sweep.choice.runs import RunRecord, number, swept_keys

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]
FIRST = ("method", "beta", "seed", "tuning")
ENDS = ("", "_low", "_high")
BOUNDED = ("accuracy", "auc", "margin_nats")  # with the ends of an interval


def summary_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """A row per run, in the order given; None where a value was not measured or the run has not ended well.

    KL, margin: nats per answer and pair; `floor_nats`, `kl_floor_nats`: what rounding alone makes of them, and
    `rounding` names the columns that are no more; `sample_tokens`: mean length of fresh answers; `seconds`: wall-clock.
    """
    swept, rows = swept_keys(runs), []
    for run in runs:
        keys = {name: f"probe/{name}" for name in BOUNDED}
        keys |= {f"kl_{way}_nats": run.kl_key(way) for way in ("forward", "reverse")}
        keys |= {name: f"probe/{name}" for name in ("displacement", "saturation")}
        rounding = [name for name in keys if run.final(keys[name]) is not None and run.in_rounding(keys[name])]
        row: Row = dict(zip(FIRST, (run.method, run.beta, run.seed, run.tuning), strict=True))
        row |= {key: values.get(run.path) for key, values in swept.items()} | {"status": run.status}
        row |= {f"{name}{end}": run.final(f"{keys[name]}{end}") for name in BOUNDED for end in ENDS}
        ways = ("kl_forward_nats", "kl_reverse_nats")
        row |= {f"{name}{end}": run.final(f"{keys[name]}{end}") for name in ways for end in ("", "_se")}
        row["displacement"] = run.final(keys["displacement"])
        row["held_out_rows"] = run.held_out_rows if run.finished and run.held_out_rows else None
        row |= {"floor_nats": run.final(FLOOR), "kl_floor_nats": run.final(KL_FLOOR)}
        row |= {"rounding": ", ".join(rounding) or None, "sample_tokens": run.tokens_per_answer}
        row |= {f"gold_reward{end}": run.final(f"gold/reward{end}") for end in ENDS}
        row |= {f"win_rate{end}": number(run.judged.get(f"win_rate{end}")) for end in ENDS}
        row |= {"capability": run.final("gold/capability"), "saturation": run.final(keys["saturation"])}
        rows.append(row | {"seconds": run.seconds, "path": run.path, "error": run.error})
    return rows


def to_csv(rows: Sequence[Row]) -> str:
    """Comma-separated, one header line; what is missing stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


COLUMNS = (  # heading, what the cell holds, format; `_low`, `_high` or `_se` of it become an interval
    ("accuracy", "accuracy", ".3f"),
    ("AUC", "auc", ".3f"),
    ("margin, nats", "margin_nats", ".2f"),
    ("KL forward, nats", "kl_forward_nats", ".2f"),
    ("KL reverse, nats", "kl_reverse_nats", ".2f"),
    ("displaced", "displacement", ".2f"),
    ("held-out rows", "held_out_rows", ".0f"),
    ("rounding of an answer, nats", "floor_nats", ".3f"),
    ("KL of rounding, nats", "kl_floor_nats", ".2g"),
    ("tokens", "sample_tokens", ".1f"),
    ("gold reward", "gold_reward", ".2f"),
    ("win rate", "win_rate", ".3f"),
    ("capability", "capability", ".3f"),
    ("saturation", "saturation", ".2f"),
    ("seconds", "seconds", ".0f"),
)


def to_markdown(rows: Sequence[Row], recommended: str | None, pages: Collection[str] = ()) -> str:
    """The rows as a Markdown table with intervals; the recommended run in bold, linked to its page where in `pages`."""
    shown = [column for column in COLUMNS if any(row[column[1]] is not None for row in rows)]
    leading = _leading(rows)
    headings = [*leading, *(heading for heading, _, _ in shown), "path", "error"]
    lines = []
    for row in rows:
        cells = [*(_text(row[key]) for key in leading), *(_measured(row, key, form) for _, key, form in shown)]
        path = inline(row["path"])
        path = f"[{path}](<{row['path']}/report.md>)" if row["path"] in pages else path
        path = f"**{path}**" if row["path"] == recommended else path
        lines.append([*map(inline, cells), path, inline(_text(row["error"]))])
    return table(headings, lines, left=len(headings)) + "\n"


def _leading(rows: Sequence[Row]) -> list[str]:
    return list(rows[0])[: list(rows[0]).index("status") + 1]


def _measured(row: Row, key: str, form: str) -> str:
    """A measured value with its 95 % interval or standard error; empty where it was not measured."""
    if row[key] is None:
        return ""
    low, high, error = (row.get(f"{key}{end}") for end in ("_low", "_high", "_se"))
    text = number_text(row[key], form) + (" (rounding)" if _in_rounding(row, key) else "")
    if low is not None and high is not None:
        return f"{text} {range_text((low, high), form)}"
    return f"{text} ± {number_text(error, form)}" if error is not None else text


def _in_rounding(row: Row, key: str) -> bool:
    return key in (row["rounding"] or "").split(", ")


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


SHORT = ("accuracy", "AUC", "KL reverse, nats", "gold reward", "win rate", "capability")
SWEPT = 3  # axes beside method and beta that a terminal has room for


def terminal_table(rows: Sequence[Row], recommended: str | None, title: str) -> Table:
    """The few columns that decide, for a terminal of 80 columns; an arrow marks the recommended run."""
    from rich.markup import escape
    from rich.table import Table

    shown = [c for c in COLUMNS if c[0] in SHORT and any(row[c[1]] is not None for row in rows)]
    leading = [key for key in _leading(rows) if key not in ("seed", "tuning") or len({row[key] for row in rows}) > 1]
    swept = [key for key in leading if key not in (*FIRST, "status")]
    leading = [key for key in leading if key not in swept[SWEPT:]]
    captions = ["→ recommended"] if recommended else []
    captions += [f"{len(swept) - SWEPT} more keys differ: summary.md has them"] if len(swept) > SWEPT else []
    table = Table(title=escape(title), title_justify="left", caption="; ".join(captions) or None)
    table.add_column("")
    for key in leading:
        table.add_column(escape(key.removeprefix("trl.")), justify="left" if key in ("method", "status") else "right")
    for heading, _, _ in shown:
        table.add_column(heading.replace(" reverse, nats", "\nreverse").replace(" reward", ""), justify="right")
    for row in rows:
        mark = "→" if row["path"] == recommended else ""
        cells = (
            "rounding" if _in_rounding(row, key) else "" if row[key] is None else number_text(row[key], form)
            for _, key, form in shown
        )
        style = "bold" if mark else None if row["status"] == "done" else "dim"
        table.add_row(mark, *(escape(_text(row[key])) for key in leading), *cells, style=style)
    return table
