"""A run beside the published one that it repeats: what was reached there, what here, and in what the two differ."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from dpo_kit.config.compose import check, compose_unchecked
from dpo_kit.config.identity import comparable, flatten, list_differences
from dpo_kit.config.settings import Experiment
from dpo_kit.run.report.numbers import bounds

SAME = (  # what may differ from the recipe: another draw, what only measures or permits, rows at a time
    "seed",
    "trl.seed",
    "trl.data_seed",
    "trl.beta",  # follows beta
    "speed.",
    "callbacks.",
    "allow_",
    "trl.per_device_train_batch_size",  # the product of the two is held against the published one
    "trl.gradient_accumulation_steps",
    "trl.per_device_eval_batch_size",
)
NOT_SAME = ("callbacks.patience", "callbacks.extra")  # these can end training early


def batch_fault(experiment: Experiment | None, trl: Mapping[str, Any], batch: int) -> str | None:
    """What to set where this run's `batch` (rows per optimizer step) is not that of the published one; else None."""
    if experiment is None or batch == experiment.batch:
        return None
    at_a_time = batch // trl["gradient_accumulation_steps"]
    steps, rest = divmod(experiment.batch, at_a_time)
    remedy = f"trl.gradient_accumulation_steps={steps}" if steps and not rest else "trl.per_device_train_batch_size"
    return f"{batch} rows per optimizer step, not {experiment.batch} ({remedy} makes it so)"


def compare_with_published(manifest: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The published values of each measured key beside this run's last one (of the rows of metrics.jsonl, `history`);
    None where no published run is repeated.

    `differs` says in what the run is not the recipe.
    """
    if not (given := manifest["config"].get("experiment")):
        return None
    experiment = Experiment(**given)
    final, figures = {key: value for row in history for key, value in row.items() if value is not None}, []
    for key, values in experiment.expected.items():
        ends = bounds(final, key) if key in final else None
        interval = dict(zip(("low", "high"), ends, strict=True)) if ends else {}
        figures.append({"key": key, "expected": list(values), "measured": final.get(key), **interval})
    return {
        "name": experiment.name,
        "source": experiment.source,
        "expected_from": experiment.expected_from,
        "differs": list(_differences(manifest, experiment)),
        "figures": figures,
    }


def _differences(manifest: Mapping[str, Any], experiment: Experiment) -> Iterator[str]:
    """Another batch, another kind of start, and each key of the resolved config that is not as the recipe has it:
    `experiment=<name>` and nothing else, unchecked; from the run's own --config-dir too.
    """
    config, flag = manifest["config"], "--config-dir="
    if batch := batch_fault(experiment, config["trl"], manifest["effective_batch"]):
        yield batch
    try:
        words = shlex.split(manifest.get("command") or "")
        own = [word.removeprefix(flag) for word in words if word.startswith(flag)]
        search = [f"hydra.searchpath=[file://{folder}]" for folder in own]
        recipe = compose_unchecked([*search, f"experiment={experiment.name}"])
        if OmegaConf.is_missing(recipe.model, "path"):
            recipe.model.path = config["model"]["path"]
            if "adapter" in manifest["model"]:
                yield f"model.path={config['model']['path']} is an adapter, the recipe asks for a whole model"
        yield from list_differences(_counted(comparable(check(recipe, trains=False))), _counted(config))
    except Exception as error:  # a file that was edited or moved while the run trained must not fail it at its end
        yield f"experiment={experiment.name} alone cannot be composed here, to compare with ({error})"


def _counted(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a resolved config in which a repetition must not differ."""
    flat = flatten(config)
    return {key: value for key, value in flat.items() if key.startswith(NOT_SAME) or not key.startswith(SAME)}
