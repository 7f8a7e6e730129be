"""report.md: a run on one page, for a code host, a tracker or a terminal; a pure function of the run directory, written
at the end and anew whenever more is known (an evaluation, the test split). Texts from elsewhere are escaped.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json, write_text
from dpo_kit.run.measures import MEASURE, WIN_RATES, as_measured
from dpo_kit.run.redact import redact, redact_command
from dpo_kit.run.report.markdown import code, fence, inline, table
from dpo_kit.run.report.numbers import ceiling_line, labelled_rows, number_text, range_text, result_rows, value_text

log = logging.getLogger(__name__)
SHOWN = 5  # differences from a published run in a sentence
JUDGED = {key: MEASURE[key].row for key in ("probe/accuracy", "probe/auc", "probe/margin_nats", *WIN_RATES)}


class Facts:
    """What the files of `run` hold, secrets redacted; `result` stands for a result.json that is yet to be written."""

    def __init__(self, run: RunDirectory, result: Mapping[str, Any] | None = None) -> None:
        def read(file: Path) -> dict[str, Any]:
            return redact(read_json(file)) if file.exists() else {}

        self.run, self.result = run, redact(dict(result or run.read_result() or {}))
        self.manifest, self.data, self.test = read(run.manifest), read(run.data_report), read(run.test)
        self.judged = read(run.evaluation / "result.json")


def write_page(run_dir: str | Path, result: Mapping[str, Any] | None = None) -> str:
    """Write `run_dir`/report.md and return its text. `result` stands for a result.json that is yet to be written."""
    run = RunDirectory(Path(run_dir))
    text = page_text(Facts(run, result))
    write_text(run.page, text)
    return text


def refresh_page(run_dir: str | Path, result: Mapping[str, Any] | None = None) -> str | None:
    """`write_page` beside results that must not be lost for it: a failure is logged, and None returned."""
    try:
        return write_page(run_dir, result)
    except Exception:
        log.warning("the page of %s could not be written", run_dir, exc_info=True)
        return None


def page_text(facts: Facts) -> str:
    """The page as Markdown."""
    return "\n\n".join([*_headline(facts), *_results(facts), *_data(facts), *_repeat(facts)]) + "\n"


def _headline(facts: Facts) -> Iterator[str]:
    result, config = facts.result, facts.manifest.get("config") or {}
    name = str(result.get("method", "run"))
    beta = f" · beta {result['beta']:g}" if "beta" in result else ""
    yield f"# {inline(name)}{beta} · seed {result.get('seed', 'unknown')}"
    on = ""
    if rows := ((facts.manifest.get("data") or {}).get("train") or {}).get("rows"):
        train = config["data"]["train"]
        paths = [train] if isinstance(train, str) else [source["path"] for source in train]
        on = f" on {rows:,} rows of {', '.join(code(str(path)) for path in paths)}"
    title = inline(str((config.get("method") or {}).get("title", name)))
    steps = f", {result['steps']} steps" if "steps" in result else ""
    tuned = f"{result.get('tuning', 'some')} tuning of {code(str(result.get('model', 'an unnamed model')))}"
    # what is known of the policy against what it started from; better only where that was tested
    start, final, judged = result.get("start") or {}, result.get("final") or {}, facts.judged
    if (status := str(result.get("status", "running or killed"))) != "done":
        verdict = f"**{status.capitalize()}**: {inline(str(result.get('error', 'no reason recorded')))}"
    elif judged.get("win_rate_verdict"):
        rate = value_text(judged, "win_rate")
        against = f"{inline(str(judged['opponent']))}, on {judged['win_rate_prompts']} prompts"
        verdict = f"**{judged['win_rate_verdict'].capitalize()}**: win rate {rate} against {against}."
    elif final.get("gold/reward") is not None:  # both intervals share their prompts: they do not say which is better
        before = f", {value_text(start, 'gold/reward', '.2f')} at the start" if "gold/reward" in start else ""
        verdict = f"**Measured**: {value_text(final, 'gold/reward', '.2f')} gold reward of fresh samples{before}."
    else:
        key = next((key for key in ("probe/accuracy", "probe/auc") if key in final), None)
        accuracy = f"held-out {key.partition('/')[2]} {value_text(final, key)}, " if key else ""
        unknown = "but nobody has judged its answers (`python -m dpo_kit evaluate`)."
        verdict = f"**Not known to be better yet**: {accuracy}{unknown}"
    yield f"{title}, {tuned}{on}{steps}. {verdict}"
    if following := result.get("next"):
        yield f"Next:\n\n{fence(following, 'bash')}"


def measured(result: Mapping[str, Any]) -> Iterator[str]:
    """What a run measured, as result.json holds it, with intervals, for a page or a card."""
    yield "## Measured\n\nOn held-out prompts, against the model that training started from."
    yield table(("measure", "start", "end", "95 % interval"), result_rows(result))
    if note := ceiling_line(result.get("final") or {}, result.get("ceiling")):
        yield f"{note[0].upper()}{note[1:]}."


def sentences(published: Mapping[str, Any]) -> Iterator[str]:
    """A run beside the published one that it repeats; a verdict only where it is that one as far as can be seen."""
    differs = published["differs"]
    for figure in published["figures"]:
        expected, value = figure["expected"], figure["measured"]
        low, high = min(expected), max(expected)
        known = number_text(low, ".3f") + (f" to {number_text(high, '.3f')}" if high > low else "")
        reports = f"{len(expected)} reports" if len(expected) > 1 else "one report"
        here = "not measured here"
        if value is not None:
            ends = (figure["low"], figure["high"]) if "low" in figure else None
            here = f"{number_text(value, '.3f')} {range_text(ends, '.3f')}".rstrip() + " here"
            bottom, top = ends or (value, value)
            if not differs:
                here += ": above" if bottom > high else ": below" if top < low else ": in agreement"
        yield f"{figure['key']}: {known} published ({reports}), {here}."
    if not published["figures"]:
        yield f"{published['name']}: {published['expected_from']}."
    if differs:
        more = f" and {len(differs) - SHOWN} more" if len(differs) > SHOWN else ""
        yield f"Not the published run, so no verdict: {', '.join(differs[:SHOWN])}{more}."


def _results(facts: Facts) -> Iterator[str]:
    """What was measured, here and beside a published run, what an evaluation found, and what is off."""
    if result_rows(facts.result):
        yield from measured(facts.result)
        if facts.test:
            rows = result_rows({"final": facts.test})
            values = "; ".join(f"{label} {value} {interval}".rstrip() for label, _, value, interval in rows)
            yield f"On the test split, which played no part in any choice: {values}."
        if facts.run.picture.exists():
            yield "![the measures over steps](report.png)"
    if published := facts.result.get("published"):
        yield "## Beside the published run"
        yield "\n".join(f"- {inline(line)}" for line in sentences(published))
        yield f"Source: {inline(published['source'])}. Values: {inline(published['expected_from'])}."
    if judged := facts.judged:
        folder = facts.run.evaluation
        yield f"## Evaluated against {inline(str(judged['opponent']))}, {judged['split']} split"
        yield table(("measure", "value", "95 % interval"), labelled_rows(judged | as_measured(judged), JUDGED))
        if failed := (judged.get("judge") or {}).get("controls_failed"):
            yield f"**The judge failed these controls: {inline(', '.join(map(str, failed)))}.**"
        parts = [f"{inline(name)} {inline(str(state))}" for name, state in judged["parts"].items()]
        links = [f"[{name}](evaluation/{name})" for name in ("result.json", "samples.md") if (folder / name).exists()]
        yield f"Parts: {', '.join(parts)}. All of it: {', '.join(links)}."
        if (folder / "evaluation.png").exists():
            yield "![the evaluation](evaluation/evaluation.png)"
    if findings := facts.result.get("findings"):
        yield "## Noticed"
        yield "\n".join(f"- **{inline(f['symptom'])}** {inline(f['meaning'])} {inline(f['remedy'])}" for f in findings)


def _data(facts: Facts) -> Iterator[str]:
    splits = facts.manifest.get("data") or {}
    if not splits:
        return
    yield "## Data"
    rows = [(name, f"{split['rows']:,}", code(str(split.get("sha256", "–")))) for name, split in splits.items()]
    yield table(("split", "rows", "sha256"), rows)
    dropped = facts.data.get("dropped_by_reason") or {}
    reasons = ", ".join(f"{inline(reason)} {count:,}" for reason, count in dropped.items())
    if "rows_read" in facts.data:
        forms = "".join(f", {code(path)} as {inline(form)}" for path, form in facts.data.get("forms", {}).items())
        yield f"Read: {facts.data['rows_read']:,} rows{forms}. Dropped: {reasons or 'none'}."
    if warnings := facts.data.get("warnings"):
        lines = (f"- **{inline(w['what'])}**: {inline(w['why'])}; {inline(w['do'])}" for w in warnings)
        yield "\n".join(lines)


def _repeat(facts: Facts) -> Iterator[str]:
    """The command, and what the run was made of and on; what its manifest does not say is left out."""
    manifest = facts.manifest
    if not manifest:
        return
    yield "## Repeat it"
    if manifest.get("command"):
        yield fence(redact_command(manifest["command"]), "bash")
    start, machine = manifest.get("model") or {}, manifest.get("machine") or {}
    rows: dict[str, str] = {}
    if "config_hash" in manifest:
        rows["config"] = code(manifest["config_hash"])
    if "path" in start:
        weights = start.get("sha256") or start.get("revision") or "of a revision that was not named"
        rows["start"] = f"{code(str(start['path']))}, weights {code(str(weights))}"
    if "effective_batch" in manifest:
        rows["rows per optimizer step"] = str(manifest["effective_batch"])
    if machine:
        named = ", ".join(f"{name} {machine[name]}" for name in ("device", "dtype", "world_size") if name in machine)
        seconds = (facts.result.get("seconds") or {}).get("train")
        rows["machine"] = inline(named) + (f", {seconds:g} s of training" if seconds is not None else "")
    if manifest.get("git"):
        rows["code"] = code(manifest["git"])
    if versions := manifest.get("versions"):
        rows["versions"] = inline(", ".join(f"{name} {version}" for name, version in versions.items()))
    yield table(("", ""), rows.items(), left=2)
