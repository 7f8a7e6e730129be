"""A finished run measured once on the test split, which neither a checkpoint nor a choice has seen."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from accelerate import Accelerator

from dpo_kit.callbacks.gold import GoldFigures, load_gold
from dpo_kit.callbacks.probe import PairProbe
from dpo_kit.callbacks.reference import Reference
from dpo_kit.callbacks.scores import Scores, preference_metrics, reward_metrics
from dpo_kit.config.recall import recall_config
from dpo_kit.config.settings import Callbacks, Data, Method, Model
from dpo_kit.data.other_rows import distinct_prompts
from dpo_kit.data.prepare import prepare
from dpo_kit.data.rows import Kind, Rows
from dpo_kit.errors import DataError
from dpo_kit.model.batches import measuring
from dpo_kit.model.hardware import has_accelerator
from dpo_kit.model.load import load_reference, load_tokenizer, load_tuned
from dpo_kit.model.sampling import draw_samples
from dpo_kit.model.tokens import Truncation
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import digest, read_json, write_json
from dpo_kit.run.quiet import quiet_libraries
from dpo_kit.run.report.page import refresh_page
from dpo_kit.trainer.manifest import contents, keep_date


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


def measure_test_split(run_dir: str | Path, step: int | None = None) -> dict[str, float]:
    """Held-out measures (nats, shares, intervals; the keys of result.json) of the policy that the run left, at its end
    or after `step` steps, on `test`.

    Written to test.json; a run that has one is read. Everything it was made of comes from its manifest.
    """
    run = RunDirectory(Path(run_dir))
    file = run.test_of(step)
    if file.exists():
        return read_json(file)
    manifest, config, tokenizer, kind, rows = recall(run, "test")
    model, method = Model(**config["model"]), Method(**config["method"])
    tuned = Tuned(place(load_tuned(model, run.weights(step))), tokenizer, SimpleNamespace(**config["trl"]))
    beta = config["beta"] if method.implicit_reward else None
    values: dict[str, float] = {}
    if kind != "prompts":
        scores, _ = score_rows(tuned, rows, load_reference(model), beta)
        values = preference_metrics(scores, beta, method.saturation) | reward_metrics(scores, beta)
    if path := config["data"]["gold"]:
        gold, prompts = load_gold(path), list({row["prompt_id"]: row for row in rows}.values())
        measured = manifest["measuring"]  # None where nothing was
        length = measured["max_new_tokens"] if measured else Callbacks(**config["callbacks"]).at_most("max_new_tokens")
        with measuring(tuned):  # type: ignore[arg-type]
            samples = draw_samples(tuned.model, tuned.processing_class, prompts, max_new_tokens=length)
        values |= GoldFigures(gold, tuned)(0, samples)
    write_json(file, values)
    refresh_page(run.root)
    return values


def score_reference_pool(run_dir: str | Path, most: int, least: int, seconds: float) -> list[list[float]]:
    """Gold rewards of `least` to `most` answers of the run's reference to each prompt that its own fresh answers were
    measured on, (prompts, answers): as many as can be drawn in so many seconds.
    """
    manifest, config, tokenizer, _, rows = recall(RunDirectory(Path(run_dir)), "select")
    gold, chosen = load_gold(config["data"]["gold"]), manifest["measuring"]
    rows = distinct_prompts(rows)[: chosen["prompts"]]
    reference = place(load_reference(Model(**config["model"])))
    tuned = Tuned(reference, tokenizer, SimpleNamespace(**config["trl"]))
    rewards: list[list[float]] = []
    started = time.monotonic()
    with measuring(tuned, seed=config["seed"]):  # type: ignore[arg-type]
        while len(rewards) < least or (len(rewards) < most and time.monotonic() - started < seconds):
            drawn = draw_samples(tuned.model, tokenizer, rows, max_new_tokens=chosen["max_new_tokens"])
            rewards.append(gold.gold_rewards([row["prompt"] for row in rows], [sample.text for sample in drawn]))
    return [list(of_prompt) for of_prompt in zip(*rewards, strict=True)]


def recall(
    run: RunDirectory, split: Literal["select", "test"]
) -> tuple[dict[str, Any], dict[str, Any], Any, Kind, Rows]:
    """What a run was made of, as its manifest says: that manifest, its config, its tokenizer, and a held-out split with
    the kind of its rows. DataError where the rows are others now.
    """
    quiet_libraries()
    manifest = read_json(run.manifest)
    config = recall_config(manifest)
    tokenizer = load_tokenizer(Model(**config["model"]))
    keep_date(run, tokenizer)
    kind, rows = read_held_out(config, Method(**config["method"]), tokenizer, split)
    refuse_other_rows(manifest, split, rows)
    return manifest, config, tokenizer, kind, rows


def refuse_other_rows(manifest: dict[str, Any], split: str, rows: Rows) -> None:
    """DataError where the sources now give other rows than the run was made of: trained ones may be among them."""
    then = (manifest.get("data") or {}).get(split)
    if then and digest(contents(rows)) != then["sha256"]:
        raise DataError(
            f"data.train={manifest['config']['data']['train']} gives other {split} rows now than the run was made of "
            f"({len(rows)}, then {then['rows']}), and rows that it was trained on may be among them: bring its files "
            "back to what they were, or measure its policy on rows of your own, policy=<run>/model reference=… "
            "data=jsonl data.eval=FILE"
        )


def read_held_out(
    config: dict[str, Any], method: Method, tokenizer: Any, split: Literal["select", "test", "all"]
) -> tuple[Kind, Rows]:
    """The kind and the rows of a held-out split, read and cut as those of a run of `config` are; where its only
    rows are held-out ones (`data.train` is `data.eval`), nothing need be left to train on.
    """
    truncation = Truncation.of(config["trl"])
    data = prepare(
        Data(**config["data"]),
        wanted=method.rows,
        tokenizer=tokenizer,
        max_length=truncation.max_length,
        truncation=truncation.mode,
        seed=config["seed"],
        trains=config["data"]["train"] != config["data"]["eval"],
    )
    return data.kind, [*data.select, *data.test] if split == "all" else getattr(data, split)


def score_rows(
    tuned: Tuned, rows: Rows, reference: Any, beta: float | None, path: Path | None = None
) -> tuple[Scores, Rows]:
    """Logratios of `rows` between the tuned policy and `reference` (its weights), and the rows that could be scored;
    row by row also in the file `path`, as a probe.jsonl.
    """
    against = Reference(tuned, model=place(reference), is_start=False)  # type: ignore[arg-type]
    probe = PairProbe(tuned, rows, beta=beta, reference=against, path=path)  # type: ignore[arg-type]
    return probe.scores(), probe.rows


def place(model: Any) -> Any:
    """`model` where it is fastest; 4-bit weights are there already."""
    fixed = getattr(model, "is_loaded_in_4bit", False)
    return model if fixed else model.to("cuda" if has_accelerator() else "cpu")
