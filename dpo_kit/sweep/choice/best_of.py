"""What best-of-n of the untouched model gives under the same measure: what a tuned policy has to be better than."""

import contextlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_kit.errors import DataError
from dpo_kit.run.files import read_json, write_json
from dpo_kit.sweep.choice.runs import RunRecord

FILE = "best_of_n.json"  # in the folder of a sweep
LEAST, MOST = 4, 16  # answers of the reference to each prompt, as many as a tenth of the sweep's time gives
SHARE = 0.1


@dataclass(frozen=True)
class BestOf:
    """Best of `n`: the most that it drifts (nats per answer), and what it reaches with a 95 % interval."""

    n: int
    kl: float
    value: float
    low: float
    high: float


def drift_bound(n: int) -> float:
    """KL(best of n‖reference) is at most log n − (n − 1)/n nats, and is that where no two answers score the same
    (arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(scores: Sequence[Sequence[float]]) -> list[BestOf]:
    """Best of 1 to m answers from the `scores` of m answers to each prompt: the mean of the best over all choices of n
    out of m, which is unbiased; intervals by bootstrap over prompts.
    """
    import torch

    from dpo_kit.callbacks.metrics import bootstrap_interval

    ordered = torch.tensor(scores, dtype=torch.float64).sort(dim=1).values
    size, prompts, found = ordered.shape[1], [str(index) for index in range(len(scores))], []
    for n in range(1, size + 1):
        chances = [math.comb(place, n - 1) / math.comb(size, n) for place in range(size)]
        values = ordered @ torch.tensor(chances, dtype=torch.float64)
        found.append(BestOf(n, drift_bound(n), float(values.mean()), *bootstrap_interval(values, prompts)))
    return found


def as_good_as(value: float, points: Sequence[BestOf]) -> tuple[str, BestOf]:
    """The highest of `points` (by n) that a policy of that `value` reaches, or the lowest above n = 1; in words."""
    if reached := [point for point in points if point.n > 1 and point.value <= value]:
        return "at least as good as", reached[-1]
    return "not better than", next(point for point in points if point.n > 1)


def win_rates_of_best_of(most: int = MOST) -> list[BestOf]:
    """The win rate without ties of best-of-n against the untouched model, before the judge that picks the best:
    n/(n + 1), whatever judge and model, as each of n + 1 answers is the best with the same chance.
    """
    return [BestOf(n, drift_bound(n), rate := n / (n + 1), rate, rate) for n in range(1, most + 1)]


def find_ideal(sweep_dir: Path, runs: Sequence[RunRecord], given: str | Path | None) -> dict[str, Any]:
    """The best possible frontier: from the file named, else ideal.json in the sweep or beside the gold module; or {}.
    One that names its weights (`model_sha256`) holds for runs that start from these. DataError: not of that form.
    """
    places = [Path(given)] if given else [sweep_dir / "ideal.json"]
    module = next((gold for run in runs if (gold := (run.config.get("data") or {}).get("gold"))), None)
    with contextlib.suppress(ImportError):
        spec = importlib.util.find_spec(module) if module and not given else None
        places += [Path(spec.origin).parent / "ideal.json"] if spec and spec.origin else []
    for path in (path for path in places if given or path.exists()):
        try:
            ideal = read_json(path)
            curve = [(float(kl), float(gold)) for kl, gold in ideal.get("ideal") or []]
            best_of = [(float(n), float(kl), float(gold)) for n, kl, gold in ideal.get("best_of_n") or []]
        except (OSError, AttributeError, TypeError, ValueError) as error:
            form = '{"ideal": [[kl, gold], …], "best_of_n": [[n, kl, gold], …]}'
            raise DataError(f"ideal={path} must hold {form}: {error}") from error
        weights = {(run.manifest.get("model") or {}).get("sha256") for run in runs if run.manifest}
        holds = given or ideal.get("model_sha256") is None or weights == {ideal["model_sha256"]}
        return {"ideal": curve, "best_of_n": best_of} if holds else {}
    return {}


def gold_of_best_of(sweep_dir: Path, ideal: Mapping[str, Any]) -> list[BestOf]:
    """The gold reward of best-of-n: what `measure_best_of` left in the folder of a sweep, else what the `ideal`
    frontier knows of it; [] where neither does.
    """
    if (file := sweep_dir / FILE).exists():
        return [BestOf(**point) for point in read_json(file)["points"]]
    return [BestOf(int(n), kl, value, value, value) for n, kl, value in sorted(ideal.get("best_of_n") or ())]


def measure_best_of(sweep_dir: Path, run_dir: Path, seconds: float) -> None:
    """Draw answers of the reference of a run, and write what the best of 1 to n of them are worth; `seconds`: those of
    the whole sweep.
    """
    from dpo_kit.trainer.held_out import score_reference_pool

    scores = score_reference_pool(run_dir, MOST, LEAST, SHARE * seconds)
    found = {"prompts": len(scores), "answers": len(scores[0]), "points": [vars(point) for point in best_of_n(scores)]}
    write_json(sweep_dir / FILE, found)
