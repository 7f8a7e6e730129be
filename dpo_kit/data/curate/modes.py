"""What each mode of `python -m dpo_kit data` reads, does, writes and shows."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_kit.config.settings import Settings
from dpo_kit.data.curate.convert import convert
from dpo_kit.data.curate.rules import Setting, curate
from dpo_kit.data.gather import Gathered, eval_sources, gather, read_rows, refuse_malformed, sources
from dpo_kit.data.options import Tool
from dpo_kit.data.prepare import keep_signal, split
from dpo_kit.data.read import Fault
from dpo_kit.data.report.duplicates import held_prompts, read_benchmark
from dpo_kit.data.report.inspect import inspect, warn
from dpo_kit.data.report.picture import draw_data_report, show_report
from dpo_kit.data.report.preference import measure_preference, reference_margins
from dpo_kit.data.rows import Rows
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.run.files import write_json, write_text
from dpo_kit.run.words import command, override, training
from dpo_kit.toy import is_out_of_its_world


def check_data(settings: Settings, tool: Tool) -> None:
    """The whole report. Malformed rows are listed, and then refused where training would refuse them."""
    data, tokenizer = settings.data, _tokenizer(settings)
    gathered = gather(data, tokenizer, refuse=False, bare=settings.method.rows == "prompts")
    malformed = list(gathered.faults)
    train, held_out = split(gathered, data, *_limit(settings))
    report = _inspect(gathered, train, held_out, settings)
    if data.reference_margin:
        rows = [row for part in train for row in part]
        report["reference"] = measure_preference(_margins(rows, gathered, settings, tokenizer))
    out = tool.claim_folder()
    write_json(out / "data_report.json", report)
    _write_rows(out / "dropped_rows.jsonl", map(vars, gathered.faults))
    title = f"{report['rows']['train']:,} {'pairs' if gathered.kind == 'pairs' else 'rows'} to train on"
    draw_data_report(out / "data_report.png", report, title=title)
    show_report(report, title=title)
    words = [word for word in tool.words if not word.startswith(("mode=", "out="))]
    _say_end(out, f"{command(*words, 'mode=curate', tool='data')}, or train: {training(tool.words)}")
    if data.on_bad_row == "fail":
        refuse_malformed(malformed)


def curate_data(settings: Settings, tool: Tool) -> None:
    """Rows of data.train that are worth training on, the others with their reasons, and a report before and after."""
    data, tokenizer = settings.data, _tokenizer(settings)
    gathered = gather(data, tokenizer)
    kind, faults = gathered.kind, gathered.faults
    rows = keep_signal([row for part in gathered.train for row in part], kind, *_limit(settings), faults)
    held_out = keep_signal(gathered.held_out or [], kind, *_limit(settings), faults)
    held = held_prompts(held_out)
    benchmark = read_benchmark(data.benchmark) if data.benchmark else []

    def hardness(kept: Rows) -> list[float]:
        return [by_token for _, by_token in _margins(kept, gathered, settings, tokenizer)]

    gathered.read -= len(held_out)  # not curated
    before = _inspect(gathered, [rows], [], settings, held)
    kept, dropped = curate(rows, Setting(kind, tool.curate, settings.seed, [*held, *benchmark], hardness))
    left_out = [*faults, *(fault for _, fault in dropped)]
    after = _inspect(replace(gathered, faults=left_out), [kept], [], settings, held)
    after["warnings"] = [warning for warning in after["warnings"] if warning["about"] != "dropped_by_reason"]  # meant
    rejects = [vars(fault) for fault in faults]
    for row, fault in dropped:
        rejects.append({"place": fault.place, "reason": fault.reason, "found": fault.found, "row": row["_values"]})
    out = tool.claim_folder()
    files = {"curated.jsonl": (row["_values"] for row in kept), "rejects.jsonl": rejects}
    counts = {"read": gathered.read, "kept": len(kept), "left_out": _by_reason(left_out)}
    _write_with_manifest(out, settings, tool, files, counts)
    write_json(out / "data_report.json", {"before": before, "after": after})
    title = f"{len(kept):,} of {gathered.read:,} rows kept"
    draw_data_report(out / "data_report.png", after, title=title, before=before)
    show_report(after, title=title, before=before)
    _say_end(out, training(tool.words, out / "curated.jsonl"))


def convert_data(settings: Settings, tool: Tool) -> None:
    """Rows of any form as pairs or unary rows."""
    from rich.console import Console
    from rich.table import Table

    data, unread = settings.data, list[Fault]()
    if tool.convert.schema_ is not None:
        data = data.model_copy(update={"form": tool.convert.schema_})
    read = [(source, *read_rows(source, data.train_split, data, unread)) for source in sources(data.train)]
    converted = convert([(match.form, rows) for _, match, rows in read], tool.convert, settings.seed)
    rows, used, faults = converted.rows, converted.used, [*unread, *converted.faults]
    if data.on_bad_row == "fail":
        refuse_malformed([fault for fault in faults if fault.place not in used])
    if not rows:
        first = f", the first: {faults[0]}" if faults else ""
        raise DataError(f"no row came out{first}: say what the rows are with data.form and data.columns")
    for source, match, _ in read:
        _say(f"{source.path} is read as {match}")
    out = tool.claim_folder()
    places = {fault.place for fault in faults}
    counts = {
        "read": len(used | places),
        "used": len(used),
        "rejected": len(places - used),
        "rows_made": len(rows),
        "made_twice": converted.repeated,
        "faults": _by_reason(faults),
    }
    _write_with_manifest(out, settings, tool, {"converted.jsonl": rows, "rejects.jsonl": map(vars, faults)}, counts)
    title = f"{len(rows):,} rows of {len(used):,}"
    table = Table("left out", "rows", title=title, title_justify="left")
    for reason, count in _by_reason(faults).items():
        table.add_row(reason, f"{count:,}")
    Console().print(table if faults else title)
    _say_end(out, command("data=jsonl", override("data.train", out / "converted.jsonl"), tool="data"))


MODES: dict[str, Callable[[Settings, Tool], None]]
MODES = {"check": check_data, "curate": curate_data, "convert": convert_data}

# --- what they share ---------------------------------------------------------------------------------------------


def _tokenizer(settings: Settings) -> Any:
    from dpo_kit.run.quiet import quiet_imports, quiet_libraries

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # nothing is forked here
    quiet_imports()
    from dpo_kit.model.load import load_tokenizer

    quiet_libraries()
    return load_tokenizer(settings.model)


def _limit(settings: Settings) -> tuple[int | None, str]:
    return settings.trl["max_length"], settings.trl.get("truncation_mode", "keep_start")


def _inspect(
    gathered: Gathered, train: list[Rows], held_out: Rows, settings: Settings, held: Sequence[str] = ()
) -> dict[str, Any]:
    data, limit = settings.data, settings.trl["max_length"]
    thorough = gathered.kind != "prompts"  # near-duplicates are told by answers
    options: dict[str, Any] = {"wanted": settings.method.rows, "max_length": limit, "benchmark": data.benchmark}
    report = inspect(gathered, train, held_out, held=held, thorough=thorough, **options)
    if is_out_of_its_world(settings.model.path, (source.path for source in sources(data.train))):
        report["warnings"].insert(0, warn("other tokens"))
    return report


def _margins(rows: Rows, gathered: Gathered, settings: Settings, tokenizer: Any) -> list[tuple[float, float]]:
    if gathered.kind == "unary":
        what = "data.reference_margin and curate.hardest compare two answers"
        raise ConfigError(f"{what}, but these rows have one: leave them out")
    return reference_margins(rows, settings, tokenizer)


def _write_with_manifest(
    out: Path, settings: Settings, tool: Tool, files: dict[str, Iterable[Any]], counts: dict[str, Any]
) -> None:
    """The rows of `files`, and what went in, was asked for and came out, with hashes: the same for the same input."""
    data, inputs = settings.data, dict[str, str | None]()
    for source in (*sources(data.train), *eval_sources(data)):  # None for folders and hub data sets
        path = Path(source.path)
        inputs[source.path] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    manifest = {
        "mode": tool.mode,
        "options": getattr(tool, tool.mode).model_dump(by_alias=True),
        "data": data.model_dump(),
        "seed": settings.seed,
        "model": settings.model.path,
        "max_length": settings.trl["max_length"],
        "inputs": inputs,
        "counts": counts,
        "outputs": {name: _write_rows(out / name, rows) for name, rows in files.items()},
        "versions": {name: version(name) for name in ("dpo-kit", "datasketch", "numpy")},
    }
    write_json(out / "manifest.json", manifest)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Write JSONL; what JSON has no form for (dates of a table, say) becomes text. Returns row count and sha256."""
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    text = "".join(lines)
    write_text(path, text)
    return {"rows": len(lines), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _by_reason(faults: Iterable[Fault]) -> dict[str, int]:
    return dict(Counter(fault.reason for fault in faults).most_common())


def _say_end(out: Path, next_command: str) -> None:
    _say(f"written to {out}: {', '.join(sorted(file.name for file in out.iterdir()))}\nnext: {next_command}")


def _say(text: str) -> None:
    from rich.console import Console

    Console().print(text, highlight=False, markup=False, soft_wrap=True)
