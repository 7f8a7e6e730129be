"""A finished run measured once on the test split, which neither a checkpoint nor a choice has seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from accelerate import Accelerator

from dpo_kit.data.prepare import Rows, prepare
from dpo_kit.data.rows import Kind
from dpo_kit.gold import GoldFigures, load_gold
from dpo_kit.hardware import has_accelerator
from dpo_kit.manifest import keep_date
from dpo_kit.model import load_reference, load_tokenizer, load_tuned
from dpo_kit.page import refresh_page
from dpo_kit.probe import PairProbe
from dpo_kit.quiet import quiet_libraries
from dpo_kit.run import RunDirectory, read_json, write_json
from dpo_kit.sampling import draw_samples, measuring
from dpo_kit.scores import Scores, preference_metrics, reward_metrics
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
    keep_date(run, tokenizer)
    kind, rows = read_held_out(config, method, tokenizer, "test")
    tuned = Tuned(place(load_tuned(model, run.model)), tokenizer, SimpleNamespace(**config["trl"]))
    beta = config["beta"] if method.implicit_reward else None
    values: dict[str, float] = {}
    if kind != "prompts":
        scores, _ = score_rows(tuned, rows, load_reference(model), beta)
        values = preference_metrics(scores, beta, method.saturation) | reward_metrics(scores, beta)
    if gold := config["data"]["gold"]:
        values |= _gold(tuned, rows, gold, config["callbacks"]["max_new_tokens"])
    write_json(run.test, values)
    refresh_page(run.root)
    return values


def read_held_out(
    config: dict[str, Any], method: Method, tokenizer: Any, split: Literal["select", "test"]
) -> tuple[Kind, Rows]:
    """The kind and the rows of a held-out split, read and cut as those of a run of `config` are."""
    trl = config["trl"]
    data = prepare(
        Data(**config["data"]),
        wanted=method.rows,
        tokenizer=tokenizer,
        max_length=trl["max_length"],
        truncation=trl.get("truncation_mode", "keep_start"),
        seed=config["seed"],
    )
    return data.kind, getattr(data, split)


def score_rows(tuned: Tuned, rows: Rows, reference: Any, beta: float | None) -> tuple[Scores, Rows]:
    """Logratios of `rows` between the tuned policy and `reference` (its weights), and the rows that could be scored."""
    against = Reference(tuned, model=place(reference), is_start=False)  # type: ignore[arg-type]
    probe = PairProbe(tuned, rows, beta=beta, reference=against)  # type: ignore[arg-type]
    return probe.scores(), probe.rows


def place(model: Any) -> Any:
    """`model` where it is fastest; 4-bit weights are there already."""
    fixed = getattr(model, "is_loaded_in_4bit", False)
    return model if fixed else model.to("cuda" if has_accelerator() else "cpu")


def _gold(tuned: Tuned, rows: Rows, path: str, max_new_tokens: int) -> dict[str, float]:
    gold = load_gold(path)
    prompts = list({row["prompt_id"]: row for row in rows}.values())
    with measuring(tuned):  # type: ignore[arg-type]
        samples = draw_samples(tuned.model, tuned.processing_class, prompts, max_new_tokens=max_new_tokens)
    return GoldFigures(gold, tuned)(0, samples)
