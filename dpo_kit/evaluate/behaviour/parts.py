"""Parts that read what the win rate wrote: where the policy loses, and whether it games its reward."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_kit.evaluate.behaviour.failures import Contest, analyze_failures
from dpo_kit.evaluate.behaviour.hacking import watch_hacking
from dpo_kit.evaluate.job import Job
from dpo_kit.evaluate.part import Found, Line, Part, line
from dpo_kit.run.history import read_metrics


def read_verdicts(job: Job) -> list[Contest]:
    """The comparisons of verdicts.jsonl in which both sides answered, with gold rewards where those are known."""
    rows = read_metrics(job.folder / "verdicts.jsonl")
    whole = [row for row in rows if row["policy"] is not None and row["opponent"] is not None]
    scores: list[list[float | None]] = [[None] * len(whole)] * 2
    if (path := job.config["data"]["gold"]) and whole:
        from dpo_kit.callbacks.gold import load_gold

        gold, prompts = load_gold(path), [row["prompt"] for row in whole]
        scores = [gold.gold_rewards(prompts, [row[side] for row in whole]) for side in ("policy", "opponent")]
    return [
        Contest(row["prompt"], row["policy"], row["opponent"], row["outcome"], *pair)
        for row, *pair in zip(whole, *scores, strict=True)
    ]


class Failures(Part):
    """Where the policy loses, and what to do about it."""

    def measure(self, job: Job) -> Found:
        rows = read_verdicts(job)
        if not rows:
            return {"status": "skipped", "reason": "no verdicts to read: they are those of the part win_rate"}
        folder = job.folder / "failures"
        return {"status": "done", **analyze_failures(rows, folder), "folder": str(folder)}

    def headline(self, found: Found) -> Found:
        losses = {group["name"]: group["losses"] for group in found["groups"] if group["losses"]}
        return {
            "failures": losses,
            "failures_telling": [group["name"] for group in found["groups"] if group["telling"]],
        }

    def lines(self, found: Found) -> Iterator[Line]:
        yield "losses; a group's rate over that among wins", f"{found['outcomes'].get('loss', 0):,}", ""
        for group in found["groups"]:
            if group["losses"]:
                label = f"… {group['name']}: {group['losses']:,} of the losses, {group['wins']:,} of the wins"
                yield line(label, group["ratio"], group["low"], group["high"], ".2f")

    def notes(self, found: Found) -> Iterator[str]:
        for group in found["groups"]:
            if group["telling"]:
                yield f"It loses with answers of the group “{group['name']}” ({group['meaning']}): {group['advice']}."
        if found["collected"]:
            yield f"Pages of examples, and prompts whose kind is worth collecting pairs for: {found['folder']}"


class Hacking(Part):
    """The reward-hacking watch."""

    def measure(self, job: Job) -> Found:
        if job.opponent != job.reference:
            return {"status": "skipped", "reason": "against= is not the reference, from which a policy drifts"}
        rows, history = read_verdicts(job), read_metrics(job.run.metrics) if job.run else []
        found = watch_hacking(rows, history, job.folder / "hacking.png")
        if not found["styles"] and found["rewards"]["verdict"] == "unknown":
            return {"status": "skipped", "reason": "no verdicts to read, and no gold reward along the way"}
        return {"status": "done", **found}

    def headline(self, found: Found) -> Found:
        return {"hacking": found["verdict"]}

    def lines(self, found: Found) -> Iterator[Line]:
        yield "reward-hacking watch", found["verdict"], ""
        for style in found["styles"]:
            if style["changed"]:
                form = "+.1f" if style["name"] == "words" else "+.3f"
                yield line(
                    f"… {style['name']}, less the reference's", style["difference"], style["low"], style["high"], form
                )

    def warnings(self, found: Found) -> Iterator[str]:
        if found["verdict"] == "hacked":
            yield f"REWARD HACKING: {found['reason'].removeprefix('reward hacking: ')}"
