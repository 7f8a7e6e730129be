"""report.md: a run on one page, for a code host, a tracker or a terminal; a pure function of the run directory, written
at the end and anew whenever more is known (an evaluation, the test split). Texts from elsewhere are escaped.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json, write_text
from dpo_kit.run.redact import redact, redact_command
from dpo_kit.run.report.markdown import code, fence, inline, table

log = logging.getLogger(__name__)


class Facts:
    """What the files of `run` hold, secrets redacted; `result` stands for a result.json that is yet to be written."""

    def __init__(self, run: RunDirectory, result: Mapping[str, Any] | None) -> None:
        def read(file: Path) -> dict[str, Any]:
            return redact(read_json(file)) if file.exists() else {}

        self.run, self.result = run, redact(dict(result or run.read_result() or {}))
        self.manifest, self.data, self.test = read(run.manifest), read(run.data_report), read(run.test)
        self.judged = read(run.evaluation / "result.json")

    @property
    def has_results(self) -> bool:
        """Whether anything was measured, here or by an evaluation."""
        return any((self.result.get("final"), self.result.get("published"), self.test, self.judged))


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
    parts = [*_headline(facts)]
    if facts.has_results:
        from dpo_kit.run.report.results import results

        parts += results(facts)
    if findings := facts.result.get("findings"):
        lines = (f"- **{inline(f['symptom'])}** {inline(f['meaning'])} {inline(f['remedy'])}" for f in findings)
        parts += ["## Noticed", "\n".join(lines)]
    return "\n\n".join([*parts, *_data(facts), *_repeat(facts)]) + "\n"


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
    yield f"{title}, {tuned}{on}{steps}. {_verdict(facts)}"
    if following := result.get("next"):
        yield f"Next:\n\n{fence(following, 'bash')}"


def _verdict(facts: Facts) -> str:
    """What is known of the policy against what it started from; better only where that was tested."""
    unknown, accuracy = "but nobody has judged its answers (`python -m dpo_kit evaluate`).", ""
    if (status := str(facts.result.get("status", "running or killed"))) != "done":
        return f"**{status.capitalize()}**: {inline(str(facts.result.get('error', 'no reason recorded')))}"
    if facts.has_results:
        from dpo_kit.run.measures import win_rate_key
        from dpo_kit.run.report.numbers import value_text

        start, final, judged = facts.result.get("start") or {}, facts.result.get("final") or {}, facts.judged
        if judged.get("win_rate_verdict"):
            rate = value_text(judged, win_rate_key(judged))
            against = f"{inline(str(judged['opponent']))}, on {judged['win_rate_prompts']} prompts"
            return f"**{judged['win_rate_verdict'].capitalize()}**: win rate {rate} against {against}."
        if final.get("gold/reward") is not None:  # both intervals share their prompts: they do not say which is better
            before = f", {value_text(start, 'gold/reward', '.2f')} at the start" if "gold/reward" in start else ""
            return f"**Measured**: {value_text(final, 'gold/reward', '.2f')} gold reward of fresh samples{before}."
        if key := next((key for key in ("probe/accuracy", "probe/auc") if key in final), None):
            accuracy = f"held-out {key.partition('/')[2]} {value_text(final, key)}, "
    return f"**Not known to be better yet**: {accuracy}{unknown}"


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
