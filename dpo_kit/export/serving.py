"""What a model folder must say so that others serve it right (vLLM, TGI, transformers): files only, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dpo_kit.run.files import read_json

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")
DTYPES = ("float32", "bfloat16", "float16")


def find_faults(folder: Path) -> list[str]:
    """Each reason why `folder` would not load or would answer wrongly elsewhere; empty where there is none."""
    missing = [
        name for name in ("config.json", "generation_config.json", "tokenizer_config.json") if not _there(folder, name)
    ]
    if missing:
        return [f"{name} is missing" for name in missing]
    config, shapes = read_json(folder / "config.json"), tensor_shapes(folder)
    text = config.get("text_config") or config
    return [
        *_config_faults(folder, config, text),
        *_embedding_faults(text, config, shapes),
        *_ending_faults(folder, text),
    ]


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """{name: shape} of every tensor in the safetensors files of `folder`; only their headers are read."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return shapes


def _there(folder: Path, name: str) -> bool:
    return (folder / name).exists()


def _config_faults(folder: Path, config: dict[str, Any], text: dict[str, Any]) -> list[str]:
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    checks = {
        "config.json names no architectures": not config.get("architectures"),
        f"config.json has dtype {dtype}, not one of {', '.join(DTYPES)}": dtype not in DTYPES,
        "config.json asks for code of a repository (auto_map)": "auto_map" in config,
        "config.json asks for quantisation (quantization_config) of weights that have none": "quantization_config"
        in config,
        f"{', '.join(pickles)}: pickles have no place in an export": bool(pickles),
    }
    return [fault for fault, holds in checks.items() if holds]


def _embedding_faults(text: dict[str, Any], config: dict[str, Any], shapes: dict[str, list[int]]) -> list[str]:
    """The vocabulary is the rows of the embedding, and tied embeddings are saved once."""
    rows = {
        name: shape[0] for name, shape in shapes.items() if name.endswith(("embed_tokens.weight", "lm_head.weight"))
    }
    wrong = [
        f"{name} has {count} rows, config.json says vocab_size {text.get('vocab_size')}"
        for name, count in rows.items()
        if count != text.get("vocab_size")
    ]
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    heads = [name for name in shapes if name.endswith("lm_head.weight")]
    if tied and heads:
        wrong.append(f"tie_word_embeddings is true but the folder holds {heads[0]}, which would not be read")
    return wrong if shapes else ["there are no weights in safetensors"]


def _ending_faults(folder: Path, text: dict[str, Any]) -> list[str]:
    """An answer ends at the tokenizer's EOS, which the generation config must know."""
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    faults = [
        f"eos_token_id {end} lies outside the vocabulary"
        for end in ends
        if end is not None and not 0 <= end < text["vocab_size"]
    ]
    eos = _eos_id(folder)
    if eos is not None and eos not in ends:
        faults.append(f"generation_config.json does not end at the tokenizer's EOS (id {eos}): answers would run on")
    return faults


def _eos_id(folder: Path) -> int | None:
    token = read_json(folder / "tokenizer_config.json").get("eos_token")
    token = token["content"] if isinstance(token, dict) else token
    if not _there(folder, "tokenizer.json"):
        return None
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    return next((each["id"] for each in added if each["content"] == token), None)


def has_chat_template(folder: Path) -> bool:
    return _there(folder, "chat_template.jinja") or bool(
        read_json(folder / "tokenizer_config.json").get("chat_template")
    )
