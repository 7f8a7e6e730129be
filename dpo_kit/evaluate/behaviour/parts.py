"""Parts that read what the win rate wrote: where the policy loses, and whether it games its reward."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_kit.evaluate.behaviour.failures import Compared, analyze_failures
from dpo_kit.evaluate.behaviour.hacking import watch_hacking
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.part import Found, Line, Part, interval_text, number_text
from dpo_kit.run.history import read_metrics


def read_verdicts(job: Job) -> list[Compared]:
    """The comparisons of verdicts.jsonl in which both sides answered, with gold rewards where those are known."""
    rows = read_metrics(job.folder / "verdicts.jsonl")
    whole = [row for row in rows if row["policy"] is not None and row["opponent"] is not None]
    scores: list[list[float | None]] = [[None] * len(whole)] * 2
    if (path := job.config["data"]["gold"]) and whole:
        from dpo_kit.callbacks.gold import load_gold

        gold, prompts = load_gold(path), [row["prompt"] for row in whole]
        scores = [gold.gold_rewards(prompts, [row[side] for row in whole]) for side in ("policy", "opponent")]
    return [
        Compared(row["prompt"], row["policy"], row["opponent"], row["outcome"], *pair)
        for row, *pair in zip(whole, *scores, strict=True)
    ]


# --- failures ----------------------------------------------------------------------------------------------------


def _measure_failures(job: Job) -> Found:
    rows = read_verdicts(job)
    if not rows:
        return {"status": "skipped", "reason": "no verdicts to read: they are those of the part win_rate"}
    assert job.options.failures is not None
    folder = job.folder / "failures"
    return {"status": "done", **analyze_failures(rows, job.options.failures, folder), "folder": str(folder)}


def _failure_headline(found: Found) -> Found:
    losses = {group["name"]: group["losses"] for group in found["groups"] if group["losses"]}
    return {"failures": losses, "failures_telling": [group["name"] for group in found["groups"] if group["telling"]]}


def _failure_lines(found: Found) -> Iterator[Line]:
    total = found["outcomes"].get("loss", 0)
    yield "losses; a group's rate over that among wins", f"{total:,}", ""
    for group in found["groups"]:
        if group["losses"]:
            label = f"… {group['name']}: {group['losses']:,} of the losses, {group['wins']:,} of the wins"
            yield label, number_text(group["ratio"], ".2f"), interval_text(group["low"], group["high"], ".2f")


def _failure_notes(found: Found) -> Iterator[str]:
    for group in found["groups"]:
        if group["telling"]:
            yield f"It loses with answers of the group “{group['name']}” ({group['meaning']}): {group['advice']}."
    if found["collected"]:
        yield f"Pages of examples, and prompts whose kind is worth collecting pairs for: {found['folder']}"


FAILURES = Part(_measure_failures, _failure_headline, _failure_lines, notes=_failure_notes)


# --- reward hacking ----------------------------------------------------------------------------------------------


def _measure_hacking(job: Job) -> Found:
    if job.opponent != job.reference:
        return {"status": "skipped", "reason": "against= is not the reference, from which a policy drifts"}
    rows, history = read_verdicts(job), read_metrics(job.run.metrics) if job.run else []
    found = watch_hacking(rows, history, job.folder / "hacking.png")
    if not found["styles"] and found["rewards"]["verdict"] == "unknown":
        return {"status": "skipped", "reason": "no verdicts to read, and no gold reward along the way"}
    return {"status": "done", **found}


def _hacking_lines(found: Found) -> Iterator[Line]:
    yield "reward-hacking watch", found["verdict"], ""
    for style in found["styles"]:
        if style["changed"]:
            form = "+.1f" if style["name"] == "words" else "+.3f"
            interval = interval_text(style["low"], style["high"], form)
            yield f"… {style['name']}, less the reference's", number_text(style["difference"], form), interval


def _hacking_warnings(found: Found) -> Iterator[str]:
    if found["verdict"] == "hacked":
        yield f"REWARD HACKING: {found['reason'].removeprefix('reward hacking: ')}"


HACKING = Part(_measure_hacking, lambda found: {"hacking": found["verdict"]}, _hacking_lines, _hacking_warnings)
