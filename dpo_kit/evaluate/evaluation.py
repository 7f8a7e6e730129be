"""One evaluation: its parts one after the other, then result.json, the picture, and the same in the tracker."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.errors import ConfigError, did_you_mean
from dpo_kit.evaluate.behaviour import Failures, Hacking
from dpo_kit.evaluate.benchmarks.alpaca import AlpacaEval
from dpo_kit.evaluate.benchmarks.domain import DomainPart
from dpo_kit.evaluate.benchmarks.gate import Gate
from dpo_kit.evaluate.benchmarks.mt_bench import MTBenchPart
from dpo_kit.evaluate.job import Job, share_template
from dpo_kit.evaluate.part import Found, Note, Part
from dpo_kit.evaluate.picture import draw_evaluation
from dpo_kit.evaluate.preferences import Preferences
from dpo_kit.evaluate.win_rate import WinRate
from dpo_kit.run import tracking
from dpo_kit.run.files import read_json, write_json
from dpo_kit.run.history import read_metrics
from dpo_kit.run.measures import as_measured, win_rate_key
from dpo_kit.run.report.page import refresh_page
from dpo_kit.run.rounding import in_rounding
from dpo_kit.run.words import command, override

if TYPE_CHECKING:
    from rich.console import Console

PARTS: dict[str, Part] = {  # in the order in which they are measured: the last two read what win_rate wrote
    "preferences": Preferences(),
    "win_rate": WinRate(),
    "gate": Gate(),
    "alpaca_eval": AlpacaEval(),
    "mt_bench": MTBenchPart(),
    "domain": DomainPart(),
    "failures": Failures(),
    "hacking": Hacking(),
}
SHOWN = 8  # rows of verdicts.jsonl in the tracker's table
PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}  # a sentence on the console


def evaluate(job: Job) -> dict[str, Any]:
    """Measure the parts that the job asks for; what result.json then holds: the headline of every part, and `status`,
    that of the part that lacks most. Each part's findings are in `<part>.json` of the job's folder, and those of parts
    measured earlier stay there. Raises ConfigError, DataError, ModelError.
    """
    asked, job, skipped = asked_parts(job), share_template(job), {}
    for name, part in asked.items():
        found = part.measure(job)
        if found["status"] == "skipped":
            skipped[name] = f"skipped ({found['reason']})"
        else:
            write_json(job.folder / f"{name}.json", found)
    parts = read_parts(job.folder)
    states = {name: found["status"] for name, found in parts.items()}
    result = {
        "status": next((state for state in ("partial", "waiting", "done") if state in states.values()), "skipped"),
        "policy": job.policy.name, "opponent": job.opponent_name, "split": job.split,
        "parts": states | {name: reason for name, reason in skipped.items() if name not in states},
    }  # fmt: skip
    for name, found in parts.items():
        result |= PARTS[name].headline(found)
    result["next"] = next_command(job, parts)
    write_json(job.folder / "result.json", result)
    if parts:
        draw_evaluation(job.folder / "evaluation.png", parts, title=f"{job.policy.name} against {job.opponent_name}")
    if job.run and job.folder == job.run.evaluation:
        refresh_page(job.run.root)
    _report(job, result, parts)
    return result


def asked_parts(job: Job) -> dict[str, Part]:
    """The parts asked for, in the order of measuring. ConfigError or DataError for what can be seen to be wrong."""
    for name in job.options.parts:
        if name not in PARTS:
            raise ConfigError(f"parts must be among {', '.join(PARTS)}, got {name}{did_you_mean(name, PARTS)}")
    asked = {name: part for name, part in PARTS.items() if name in job.options.parts}
    for part in asked.values():
        part.check(job)
    return asked


def read_parts(folder: Path) -> dict[str, Found]:
    """What each part found in `folder`, in the order of PARTS."""
    return {name: read_json(file) for name in PARTS if (file := folder / f"{name}.json").exists()}


def next_command(job: Job, parts: dict[str, Found]) -> str:
    """What to type next: the same again where something is missing, a judge where there was none, else the reading."""

    def again(**changed: str) -> str:
        """The command of this evaluation with the `changed` keys, and with its run where that is one of a sweep."""
        words = [word for word in job.words if word.partition("=")[0] not in (*changed, "sweep")]
        if job.run and not any(word.startswith("run=") for word in words):
            words.insert(0, override("run", job.run.root))
        if job.step is not None and not any(word.startswith("step=") for word in words):
            words.insert(1, f"step={job.step}")
        return command(*words, *(f"{key}={value}" for key, value in changed.items()), tool="evaluate")

    won = parts.get("win_rate")
    if won is None and "win_rate" not in job.options.parts:
        return again(parts="[win_rate]")
    if won is None:
        return again(**{"judge": "llm", "judge.base_url": "http://localhost:8000/v1", "judge.model": "…"})
    if won["status"] == "waiting":
        return f"fill in the column better of {job.shared / 'review*.csv'} (1, 2 or tie), then the same command"
    if won["status"] == "partial":
        return "the same command, which asks for what is missing only"
    if won["review"] and not won["review"]["checked"]:
        return f"fill in the column better of {job.folder / 'review*.csv'} (1, 2 or tie), then the same command"
    if won["win_rate_verdict"] == "not separated" and (needed := won["win_rate_needed_prompts"]):
        if won["questions"] == won["settings"]["limit"]:
            return again(**{"win_rate.limit": str(needed)})
        more = again(**{"win_rate.draws": str(max(4, 2 * job.options.win_rate.draws))})
        return f"{more}, or win_rate.prompts=FILE with about {needed:,} prompts"
    read = f"read {job.folder / 'samples.md'}"
    sweep = job.run.root.parent if job.run else None
    if sweep and (sweep / "best.json").exists():
        return f"{read}, then {command(override('sweep', sweep), tool='sweep')}"
    if won["judge"]["kind"] in ("gold", "human") or job.options.review:
        return read
    return f"{read}, and let people check the judge: {again(review=str(min(100, won['comparisons'])))}"


def _report(job: Job, result: dict[str, Any], parts: dict[str, Found]) -> None:
    """The same to the tracker: into the run's own wandb run where it has one, else as a job of type evaluate."""
    if job.tracking.reporter != "wandb" or (job.run and not job.run.wandb_file.exists()):
        return
    options = job.tracking.model_dump(exclude={"reporter"})
    if job.run:
        tracker = tracking.start({}, run_dir=job.run.root, run_id=job.run.wandb_id(), **options)
    else:
        options["name"] = f"{job.policy.name} against {job.opponent_name}"
        tracker = tracking.start(job.config, run_dir=job.folder, job_type="evaluate", **options)
    place = "evaluation" if job.options.against is None else f"evaluation/{job.folder.name}"
    place = f"evaluation/step-{job.step}" if job.step is not None else place
    flat = result | {f"gate/{key}": value for key, value in result.get("gate", {}).items()}
    numbers = {key: value for key, value in flat.items() if isinstance(value, int | float | str) and key != "next"}
    tracker.summary({f"{place}/{key}": value for key, value in numbers.items()})
    for name, picture in (("picture", "evaluation.png"), ("hacking", "hacking.png")):
        if (job.folder / picture).exists():
            tracker.image(f"{place}/{name}", job.folder / picture)
    if "win_rate" in parts:
        rows = read_metrics(job.folder / "verdicts.jsonl")[:SHOWN]
        columns = ("prompt", "policy", "opponent", "outcome")
        tracker.table(f"{place}/samples", columns, [[str(row[name]) for name in columns] for row in rows])
    tracker.finish()


def show(job: Job, result: dict[str, Any]) -> None:
    """Failed controls above all, a short table, what to know, where the files are, the next command."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console()
    parts = {name: found for name, found in read_parts(job.folder).items() if name in job.options.parts}
    sentences = _show_first(parts, console)
    if parts:
        figures = [Column(heading, justify="right") for heading in ("value", "95 % interval")]
        title = escape(f"{job.policy.name} against {job.opponent_name}")
        table = Table("measure", *figures, title=title, title_justify="left")
        for name, found in parts.items():
            for said in PARTS[name].tell(found):
                if not isinstance(said, Note):
                    table.add_row(*map(escape, said))
            table.add_section()
        console.print(table)
    unmeasured = {name: state for name, state in result["parts"].items() if name not in parts}
    sentences += [f"{name} {state}" for name, state in unmeasured.items() if name in job.options.parts]
    files = sorted(file.name for file in job.folder.iterdir() if file.is_file() and not file.name.startswith("."))
    for sentence in (*sentences, f"written to {job.folder}: {', '.join(files)}", f"next: {result['next']}"):
        console.print(sentence, **PLAIN)


def show_line(job: Job, result: dict[str, Any], console: "Console") -> None:
    """One evaluation of several in a line, failed controls above it."""
    _show_first(read_parts(job.folder), console)
    figures, measured = [], as_measured(result)
    for key in ("accuracy", "auc", win_rate_key(result)):
        if result.get(key) is not None:
            value, low, high = (result[f"{key}{end}"] for end in ("", "_low", "_high"))
            doubt = " (rounding)" if in_rounding(f"probe/{key}", measured) else ""
            figures.append(f"{key.replace('_', ' ')} {value:.3f}{doubt} [{low:.3f}, {high:.3f}]")
    figures += [f"gate {result['gate']['verdict']}"] if "gate" in result else []
    verdict = f" ({result['win_rate_verdict']})" if result.get("win_rate_verdict") else ""
    console.print(f"{job.policy.name}: {', '.join(figures)}{verdict}", **PLAIN)


def _show_first(parts: dict[str, Found], console: "Console") -> list[str]:
    """Print what must be read first; the other notes."""
    notes = [said for name, found in parts.items() for said in PARTS[name].tell(found) if isinstance(said, Note)]
    for note in notes:
        if note.first:
            console.print(note.text, style="bold red", **PLAIN)
    return [note.text for note in notes if not note.first]
