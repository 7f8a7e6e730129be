"""The rows of a sweep's table: one per run with what it measured at its end; as CSV, Markdown and in the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from dpo_kit.run.measures import FLOOR, KL_FLOOR, KLS, MEASURE, Measure
from dpo_kit.run.report.markdown import inline, table
from dpo_kit.run.report.numbers import number_text, range_text
from dpo_kit.sweep.choice.runs import RunRecord, number, swept_keys

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]  # its columns: FIRST, what is swept, "status", those of COLUMNS, "path" and "error"
FIRST = ("method", "beta", "seed", "tuning")
ALONE, ERROR, ENDS = ("",), ("", "_se"), ("", "_low", "_high")
COLUMNS = {  # name: its key in the table of measures (of a KL that of one estimator), and what stands beside the value
    "accuracy": ("probe/accuracy", ENDS),
    "auc": ("probe/auc", ENDS),
    "margin_nats": ("probe/margin_nats", ENDS),
    "kl_forward_nats": (KLS["forward"][0], ERROR),
    "kl_reverse_nats": (KLS["reverse"][0], ERROR),
    "displacement": ("probe/displacement", ALONE),
    "held_out_rows": ("held_out_rows", ALONE),
    "floor_nats": (FLOOR, ALONE),
    "kl_floor_nats": (KL_FLOOR, ALONE),
    "rounding": ("", ALONE),
    "sample_tokens": ("probe/sample_tokens", ALONE),
    "gold_reward": ("gold/reward", ENDS),
    "win_rate": ("win_rate", ENDS),
    "win_rate_corrected": ("win_rate_corrected", ENDS),
    "capability": ("gold/capability", ALONE),
    "saturation": ("probe/saturation", ALONE),
    "seconds": ("seconds", ALONE),
}


def summary_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """A row per run, in the order given; None where a value was not measured or the run has not ended well. KL, margin:
    nats per answer and pair; `floor_nats`, `kl_floor_nats`: what rounding alone makes of them, and `rounding` names the
    columns that are no more; `sample_tokens`: mean length of fresh answers; `seconds`: wall-clock.
    """
    swept, rows = swept_keys(runs), []
    for run in runs:
        keys = {name: key for name, (key, _) in COLUMNS.items()} | {f"kl_{way}_nats": run.kl_key(way) for way in KLS}
        rounding = [name for name, key in keys.items() if key in run.measured and run.in_rounding(key)]
        row: Row = dict(zip(FIRST, (run.method, run.beta, run.seed, run.tuning), strict=True))
        row |= {key: values.get(run.path) for key, values in swept.items()} | {"status": run.status}
        for name, (_, ends) in COLUMNS.items():
            values = run.judged if name.startswith("win_rate") else run.measured
            row |= {f"{name}{end}": number(values.get(f"{keys[name]}{end}")) for end in ends}
        row["held_out_rows"] = run.held_out_rows if run.finished and run.held_out_rows else None
        row |= {"rounding": ", ".join(rounding) or None, "sample_tokens": run.tokens_per_answer}
        rows.append(row | {"seconds": run.seconds, "path": run.path, "error": run.error})
    return rows


def to_csv(rows: Sequence[Row]) -> str:
    """Comma-separated, one header line; what is missing stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(rows: Sequence[Row], recommended: str | None, pages: Collection[str] = ()) -> str:
    """The rows as a Markdown table with intervals; the recommended run in bold, linked to its page where in `pages`."""
    leading, shown = _leading(rows), _shown(rows)
    headings = [*leading, *(measure.column for measure in shown.values()), "path", "error"]
    lines = []
    for row in rows:
        cells = [cell(row[key]) for key in leading]
        for name, measure in shown.items():
            value, low, high, error = (row.get(f"{name}{end}") for end in ("", "_low", "_high", "_se"))
            text = number_text(value, measure.form) + " (rounding)" * _in_rounding(row, name)
            if low is not None and high is not None:
                text += f" {range_text((low, high), measure.form)}"
            elif error is not None:
                text += f" ± {number_text(error, measure.form)}"
            cells.append("" if value is None else text)
        path = inline(row["path"])
        path = f"[{path}](<{row['path']}/report.md>)" if row["path"] in pages else path
        path = f"**{path}**" if row["path"] == recommended else path
        lines.append([*map(inline, cells), path, inline(cell(row["error"]))])
    return table(headings, lines, left=len(headings)) + "\n"


def _leading(rows: Sequence[Row]) -> list[str]:
    return list(rows[0])[: list(rows[0]).index("status") + 1]


def _shown(rows: Sequence[Row]) -> dict[str, Measure]:
    """The columns that people read and some run has."""
    measures = ((name, MEASURE.get(key)) for name, (key, _) in COLUMNS.items())
    return {name: measure for name, measure in measures if measure and any(row[name] is not None for row in rows)}


def _in_rounding(row: Row, name: str) -> bool:
    return name in (row["rounding"] or "").split(", ")


def cell(value: Any, form: str = "g") -> str:
    """A setting or a mean as text; empty where there is none."""
    return "" if value is None else f"{value:{form}}" if isinstance(value, float) else str(value)


DECIDE = ("accuracy", "auc", "kl_reverse_nats", "gold_reward", "win_rate", "win_rate_corrected", "capability")
SWEPT = 3  # axes beside method and beta that a terminal has room for


def terminal_table(rows: Sequence[Row], recommended: str | None, title: str) -> Table:
    """The few columns that decide, for a terminal of 80 columns; an arrow marks the recommended run."""
    from rich.markup import escape
    from rich.table import Table

    shown = {name: measure for name, measure in _shown(rows).items() if name in DECIDE}
    leading = [key for key in _leading(rows) if key not in ("seed", "tuning") or len({row[key] for row in rows}) > 1]
    swept = [key for key in leading if key not in (*FIRST, "status")]
    leading = [key for key in leading if key not in swept[SWEPT:]]
    captions = ["→ recommended"] if recommended else []
    captions += [f"{len(swept) - SWEPT} more keys differ: summary.md has them"] if len(swept) > SWEPT else []
    table = Table("", title=escape(title), title_justify="left", caption="; ".join(captions) or None)
    for key in leading:
        table.add_column(escape(key.removeprefix("trl.")), justify="left" if key in ("method", "status") else "right")
    for measure in shown.values():
        table.add_column(measure.short.replace(" reverse", "\nreverse").replace(" reward", ""), justify="right")
    for row in rows:
        mark = "→" if row["path"] == recommended else ""
        values = [(name, "" if row[name] is None else number_text(row[name], m.form)) for name, m in shown.items()]
        cells = ("rounding" if _in_rounding(row, name) else text for name, text in values)
        style = "bold" if mark else None if row["status"] == "done" else "dim"
        table.add_row(mark, *(escape(cell(row[key])) for key in leading), *cells, style=style)
    return table
