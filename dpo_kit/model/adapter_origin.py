"""An adapter that training goes on from: its base, and what is refused unloaded; loaded where there is one."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from dpo_kit.config.settings import Model
from dpo_kit.errors import ModelError
from dpo_kit.model.origin import ADAPTER, Start, find_file, read_file, refuse_unsafe
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json

WEIGHTS = "adapter_model.safetensors"


def base_of(model: Model, adapter: dict[str, Any]) -> Model:
    """The whole model below the `adapter` at `model.path`. ModelError for one that cannot be gone on with."""
    if model.tuning == "full":
        refuse_adapter("model.path", model.path, adapter)
    if adapter.get("peft_type") != "LORA":
        raise ModelError(f"model.path={model.path} is an adapter of kind {adapter.get('peft_type')}, not a LoRA")
    path = find_base(Path(model.path).expanduser(), adapter)
    of_adapter = {"revision": adapter.get("revision"), "trust_remote_code": False}  # whose commit was named is its own
    return model.model_copy(update={"path": path, **of_adapter})


def find_base(folder: Path, adapter: dict[str, Any]) -> str:
    """Where the base of `adapter` lies: a relative folder may be one of where the run that left it was started.
    ModelError where it names none.
    """
    if not (base := str(adapter.get("base_model_name_or_path") or "")):
        raise ModelError(
            f"{folder / ADAPTER} has no base_model_name_or_path: add the model that the adapter belongs to"
        )
    manifest = RunDirectory(folder.parent).manifest
    if manifest.exists() and not Path(base).expanduser().exists():
        there = Path(read_json(manifest).get("folder") or ".") / base
        return str(there) if there.exists() else base
    return base


def refuse_adapter(key: str, path: str, adapter: dict[str, Any]) -> NoReturn:
    """ModelError for an adapter where a whole model is meant: transformers would load its base with the adapter in it,
    and peft would tune on top, without a word.
    """
    base = adapter.get("base_model_name_or_path")
    remedy = "go on training it with model.tuning=lora or qlora, " if key == "model.path" else ""
    raise ModelError(
        f"{key}={path} is an adapter on {base}, not a model: {remedy}name the base itself ({key}={base}), or merge the "
        "adapter into it first: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("
        f"{str(base)!r}), {path!r}).merge_and_unload().save_pretrained('merged')"
    )


def refuse_adapter_weights(start: Start) -> None:
    """ModelError where peft would read the adapter at `model.path` from a pickle, as it does without a word, or where
    its embeddings have another size than those of its base.
    """
    model, base = start.model, start.base
    refuse_unsafe("model.path", model.path, model.revision)
    if (weights := find_file(model.path, WEIGHTS, model.revision)) is None:
        raise ModelError(
            f"model.path={model.path} is an adapter without {WEIGHTS} (or that file cannot be had), and only "
            "safetensors are loaded, no pickles: take a revision that has it, or convert the adapter yourself"
        )
    config = read_file(base.path, "config.json", base.revision)
    rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    with weights.open("rb") as file:  # safetensors: the length of the header, then the header as JSON
        tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    table = re.compile(r"(embed\w*|wte|head)(\.base_layer)?\.weight$")
    counts = [tensor["shape"][0] for name, tensor in tensors.items() if table.search(name)]
    if other := [count for count in counts if rows and count != rows]:
        raise ModelError(
            f"model.path={model.path} is an adapter with {other[0]} rows of embeddings, and its base has {rows}: "
            "resize the base and merge the adapter into it first: "
            f"base = AutoModelForCausalLM.from_pretrained({base.path!r}); "
            f"base.resize_token_embeddings({other[0]}); PeftModel.from_pretrained(base, {model.path!r})"
            ".merge_and_unload().save_pretrained('merged')"
        )
