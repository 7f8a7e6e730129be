"""One of the models that an evaluation compares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_kit.config.places import locate, weights_faults
from dpo_kit.config.recall import recall_config
from dpo_kit.config.settings import Model
from dpo_kit.errors import ConfigError
from dpo_kit.judge.answers import LocalModel
from dpo_kit.model.origin import ADAPTER, base_of, find_base, has_tokenizer
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import hash_weights, read_json


@dataclass(frozen=True)
class Candidate:
    """A policy, its reference or any other model: what it is called, how it is loaded, and what a run made of it.

    `tuned` is the folder that a run left (whole weights, or an adapter on `model.path`); None: the reference of
    `model`, which is `model.path` itself unless `model.reference` names another.
    """

    name: str
    model: Model
    tuned: Path | None = None
    own_tokenizer: bool = False  # the folder `tuned` has one, with its template

    def load(self) -> Any:
        """The weights, in evaluation mode. ModelError where they cannot be loaded."""
        from dpo_kit.model.load import load_reference, load_tuned

        return load_tuned(self.model, self.tuned).eval() if self.tuned else load_reference(self.model)

    def tokenizer(self) -> Any:
        """The tokenizer of `model.path`, or the adapter's own; it reads control tokens in messages as text."""
        from dpo_kit.model.load import load_tokenizer

        own = {"path": str(self.tuned), "revision": None} if self.own_tokenizer else {}
        return load_tokenizer(self.model.model_copy(update=own))

    def with_template(self, template: str) -> Candidate:
        """The same model, whose prompts are rendered with `template`."""
        return replace(self, model=self.model.model_copy(update={"chat_template": template}))

    @property
    def start(self) -> Candidate:
        """What this policy was tuned from."""
        return Candidate("its reference", self.model)

    def sampler(self) -> LocalModel:
        """This candidate as one whose answers are drawn here; known by its weights, wherever they lie."""
        from dpo_kit.model.turns import written_today

        if self.tuned is None:
            start, base = self.model.reference or self.model.path, base_of(self.model).path
            folders = [start] if self.model.reference or base == start else [base, start]
        elif self.model.tuning == "full":
            folders = [str(self.tuned)]
        else:
            folders = [base_of(self.model).path, str(self.tuned)]
        weights = [hash_weights(path) or f"{path}@{self.model.revision}" for path in folders]
        loaded = [self.model.dtype, self.model.quantization if self.model.tuning == "qlora" else None]
        identity = ["candidate", *weights, *loaded, *written_today(self.tokenizer())]
        return LocalModel(self.name, identity, self._open, wrap=False)

    def _open(self) -> tuple[Any, Any]:
        from dpo_kit.model.hardware import training_precision
        from dpo_kit.trainer.held_out import place

        fast = {"dtype": training_precision() if self.model.dtype == "auto" else self.model.dtype}
        return place(Candidate(self.name, self.model.model_copy(update=fast), self.tuned).load()), self.tokenizer()


def of_run(folder: Path) -> tuple[Candidate, dict[str, Any]]:
    """The policy that a finished run left, and the config of the run. ConfigError where there is none."""
    run = RunDirectory(folder)
    manifest, _ = run.read_finished()
    config = recall_config(manifest)
    policy = Candidate(folder.resolve().name, Model(**config["model"]), run.model)
    if manifest.get("template_date"):
        from dpo_kit.trainer.manifest import keep_date

        keep_date(run, policy.tokenizer())
    return policy, config


def of_path(key: str, path: str, model: Model) -> Candidate:
    """A model made by any tool (folder, hub id, adapter), loaded as `model` says. ConfigError for what is none."""
    folder = locate(key, path)
    if faults := [*weights_faults(key, path)]:
        raise ConfigError(faults[0])
    if RunDirectory(folder).manifest.exists():
        raise ConfigError(f"{path} is a run directory: say run={path}, or name its policy, {folder / 'model'}")
    own = {"reference": None, "revision": model.revision if path == model.path else None}
    if (folder / ADAPTER).exists():
        base = find_base(folder, read_json(folder / ADAPTER))
        based = model.model_copy(update=own | {"path": base, "tuning": "lora"})
        return Candidate(path, based, folder, own_tokenizer=has_tokenizer(str(folder), None))
    return Candidate(path, model.model_copy(update=own | {"path": path, "tuning": "full"}))
