"""What is refused of the weights of an adapter that training goes on from; loaded where there is one."""

import json
import re

from dpo_kit.errors import ModelError
from dpo_kit.model.origin import ADAPTER_WEIGHTS, Start, find_file, read_file, refuse_unsafe


def refuse_adapter_weights(start: Start) -> None:
    """ModelError where peft would read the adapter at `model.path` from a pickle, as it does without a word, or where
    its embeddings have another size than those of its base.
    """
    model, base = start.model, start.base
    refuse_unsafe("model.path", model.path, model.revision)
    if (weights := find_file(model.path, ADAPTER_WEIGHTS, model.revision)) is None:
        raise ModelError(
            f"model.path={model.path} is an adapter without {ADAPTER_WEIGHTS} (or that file cannot be had), and only "
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
