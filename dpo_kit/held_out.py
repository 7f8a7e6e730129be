"""A finished run measured once on the test split, which neither a checkpoint nor a choice has seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator

from dpo_kit.data.prepare import Rows, prepare
from dpo_kit.gold import GoldFigures, load_gold
from dpo_kit.model import load_reference, load_tokenizer, load_tuned
from dpo_kit.probe import PairProbe
from dpo_kit.quiet import quiet_libraries
from dpo_kit.run import RunDirectory, read_json, write_json
from dpo_kit.sampling import draw_samples, measuring
from dpo_kit.scores import preference_metrics, reward_metrics
from dpo_kit.scoring import Reference
from dpo_kit.settings import Data, Method, Model


@dataclass
class Tuned:
    """A tuned policy with what the measuring code asks of a trainer."""

    model: Any
    processing_class: Any
    args: Any
    accelerator: Accelerator = field(default_factory=Accelerator)
    state: Any = field(default_factory=lambda: SimpleNamespace(global_step=0))

    def is_world_process_zero(self) -> bool:
        return True


def measure_test_split(run_dir: str | Path) -> dict[str, float]:
    """Held-out measures (nats, shares, intervals; the keys of result.json) of the policy that the run left, on `test`.

    Written to test.json; a run that has one is read. Everything it was made of comes from its manifest.
    """
    run = RunDirectory(Path(run_dir))
    if run.test.exists():
        return read_json(run.test)
    quiet_libraries()
    config = read_json(run.manifest)["config"]
    model, method = Model(**config["model"]), Method(**config["method"])
    tokenizer = load_tokenizer(model)
    rows = read_test_rows(config, method, tokenizer)
    tuned = Tuned(load_tuned(model, run.model), tokenizer, SimpleNamespace(**config["trl"]))
    values = _preferences(tuned, rows, model, method, config["beta"])
    if gold := config["data"]["gold"]:
        values |= _gold(tuned, rows, gold, config["callbacks"]["max_new_tokens"])
    write_json(run.test, values)
    return values


def read_test_rows(config: dict[str, Any], method: Method, tokenizer: Any) -> Rows:
    """The rows of the test split, read and cut as the run's own were."""
    trl = config["trl"]
    data = prepare(
        Data(**config["data"]),
        wanted=method.rows,
        tokenizer=tokenizer,
        max_length=trl["max_length"],
        truncation=trl.get("truncation_mode", "keep_start"),
        seed=config["seed"],
    )
    return data.test


def _preferences(tuned: Tuned, rows: Rows, model: Model, method: Method, beta: float) -> dict[str, float]:
    given = beta if method.implicit_reward else None
    reference = Reference(tuned, model=load_reference(model).to(tuned.model.device), is_start=False)  # type: ignore[arg-type]
    scores = PairProbe(tuned, rows, beta=given, reference=reference).scores()  # type: ignore[arg-type]
    return preference_metrics(scores, given, method.saturation) | reward_metrics(scores, given)


def _gold(tuned: Tuned, rows: Rows, path: str, max_new_tokens: int) -> dict[str, float]:
    gold = load_gold(path)
    prompts = list({row["prompt_id"]: row for row in rows}.values())
    with measuring(tuned):  # type: ignore[arg-type]
        samples = draw_samples(tuned.model, tuned.processing_class, prompts, max_new_tokens=max_new_tokens)
    return GoldFigures(gold, tuned)(0, samples)
