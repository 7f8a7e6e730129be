"""Writes sweep directories as real runs leave them, from a few numbers, for tests of what is read from them."""

import json
import math
import random
from pathlib import Path
from typing import Any

from dpo_kit.run.files import write_json, write_jsonl
from dpo_kit.run.history import append_row

MODEL = {"path": "toy/model", "revision": None, "sha256": "a" * 64}


def write_run(
    sweep: Path,
    name: str,
    *,
    method: str = "dpo",
    beta: float = 0.1,
    seed: int = 0,
    gold: list[float] | None = None,
    gold_start: list[float] | None = None,
    margins: list[float] | None = None,
    kl: float | None = 2.0,
    kl_se: float = 0.2,
    capability: float | None = None,
    saturation: float | None = 0.5,
    status: str | None = "done",
    error: str = "",
    model: dict[str, Any] | None = None,
    reference: str | None = None,
    trl: dict[str, Any] | None = None,
    choose: dict[str, Any] | None = None,
    started: str = "2026-01-01",
    test: dict[str, float] | None = None,
    by_prompt: bool = True,
    measured: dict[str, float] | None = None,
) -> Path:
    """One run: `gold` and `gold_start` are rewards prompt by prompt, `margins` those of the probe's pairs (nats);
    `measured` has further final values by key.
    """
    run = sweep / name
    start, final = _values(gold_start, None, 0.0, 0.0, None), _values(gold, margins, kl, kl_se, saturation)
    final |= measured or {}
    if capability is not None:
        start["gold/capability"], final["gold/capability"] = 0.9, capability
    config = {
        "beta": beta,
        "seed": seed,
        "method": {"name": method, "beta": {"grid": [0.05, 0.1, 0.2, 0.5], "higher": "closer"}},
        "model": {"tuning": "full", "reference": reference},
        "data": {"gold": None},
        "trl": {"num_train_epochs": 1, "max_steps": -1, **(trl or {})},
    }
    words = (f"trl.{key}={value}" for key, value in (trl or {}).items() if key != "beta")
    command = " ".join([f"python -m dpo_kit method={method} beta={beta:g} seed={seed}", *words])
    manifest = {"started": started, "command": command, "config": config, "model": model or MODEL}
    write_json(run / "manifest.json", manifest | ({"choose": choose} if choose else {}))
    for step, share in ((0, 0.0), (50, 0.6), (100, 1.0)):
        append_row(run / "metrics.jsonl", {"step": step, **_between(start, final, share)})
    _write_answers(run, gold_start, gold, by_prompt)
    write_jsonl(run / "probe.jsonl", _pairs(margins or []))
    result = {"status": status, "method": method, "beta": beta, "seed": seed, "tuning": "full"}
    if status == "done":
        result |= {"start": start, "final": final, "seconds": {"train": 12.5}}
    if test:
        write_json(run / "test.json", test)
    if error:
        result["error"] = error
    if status:
        write_json(run / "result.json", result)
    return run


def _values(
    gold: list[float] | None, margins: list[float] | None, kl: float | None, kl_se: float, saturation: float | None
) -> dict[str, float]:
    values: dict[str, float | None] = {"probe/kl_reverse_rb_nats": kl, "probe/saturation": saturation}
    if kl is not None:
        values |= {"probe/kl_reverse_rb_nats_se": kl_se, "probe/kl_forward_rb_nats": 1.2 * kl}
        values |= {"probe/kl_reverse_rb_nats_per_token": kl / 20}
    if gold:
        values |= interval("gold/reward", sum(gold) / len(gold), _spread(gold))
    if margins:
        right = sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(margins)
        values |= interval("probe/accuracy", right, math.sqrt(right * (1 - right) / len(margins)))
        values |= interval("probe/margin_nats", sum(margins) / len(margins), _spread(margins))
    return {key: value for key, value in values.items() if value is not None}


def interval(key: str, value: float, se: float) -> dict[str, float]:
    return {key: value, f"{key}_low": value - 1.96 * se, f"{key}_high": value + 1.96 * se}


def _spread(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _between(start: dict[str, float], final: dict[str, float], share: float) -> dict[str, float]:
    return {key: start.get(key, 0.0) + share * (value - start.get(key, 0.0)) for key, value in final.items()}


def _write_answers(run: Path, start: list[float] | None, final: list[float] | None, by_prompt: bool) -> None:
    for step, rewards in ((0, start), (100, final)):
        for number, reward in enumerate(rewards or []):
            row = {"step": step, "prompt": f"p{number}", "answer": "a", "cut": False, "gold_reward": reward}
            append_row(run / "samples.jsonl", row | ({"prompt_id": f"p{number}", "tokens": 20} if by_prompt else {}))


def _pairs(margins: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "step": 100,
            "pair_id": f"pair{number}",
            "prompt_id": f"p{number}",
            "logratio_chosen_nats": margin - 1,
            "logratio_rejected_nats": -1.0,
            "tokens_chosen": 10,
            "tokens_rejected": 12,
        }
        for number, margin in enumerate(margins)
    ]


def rewards(mean: float, count: int = 200, spread: float = 1.0, seed: int = 0) -> list[float]:
    """Rewards of which the mean is `mean` to a rounding error, each prompt with an offset shared by all draws."""
    shared, own = random.Random(99), random.Random(seed)
    drawn = [shared.gauss(0, spread) + own.gauss(0, 0.3 * spread) for _ in range(count)]
    return [value - sum(drawn) / count + mean for value in drawn]


def write_jobs(sweep: Path, *jobs: dict[str, Any], typed: list[str] | None = None) -> None:
    """sweep.json as the launcher writes it, and multirun.yaml as Hydra does, with the overrides that were `typed`."""
    (sweep / "sweep.json").write_text(json.dumps({"jobs": [{"number": n, **job} for n, job in enumerate(jobs)]}))
    if typed is not None:
        overrides = {"hydra": ["hydra.sweep.dir=swept", "hydra.mode=MULTIRUN"], "task": typed}
        sources = [
            {"path": "dpo_kit.conf", "schema": "pkg", "provider": "main"},
            {"path": "/my options", "schema": "file", "provider": "command-line"},
        ]
        written = {"runtime": {"config_sources": sources}, "overrides": overrides}
        (sweep / "multirun.yaml").write_text(json.dumps({"hydra": written}))


def write_evaluation(run: Path, margins: list[float], *, split: str = "select", beside: str = "", **more: Any) -> None:
    """What `evaluate` leaves of held-out preferences, pair by pair too, in `run`/evaluation/`beside`."""
    folder, right = run / "evaluation" / beside, sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(margins)
    accuracy = interval("accuracy", right, math.sqrt(right * (1 - right) / len(margins)))
    found = {"split": split, "parts": {"preferences": "done"}, "held_out_rows": len(margins), **accuracy}
    write_json(folder / "result.json", found | more)
    write_jsonl(folder / "preferences.jsonl", [row | {"step": 0} for row in _pairs(margins)])
