"""Another model as the reference: what it must share with the policy, and what makes it needless."""

import filecmp
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from dpo_kit.errors import ConfigError, ModelError
from dpo_kit.model.load import load_named
from dpo_kit.model.origin import Start

SAMPLE = ("Hello, world!", "naïve café, 東京 🙂", "  two  spaces\n\tand a tab", "x = 3.14159 * 2**10  # code", "don't")
"""Texts that tokenizers of one vocabulary but other merges or normalisation encode differently."""


def refuse_other_vocabulary(start: Start, tokenizer: Any) -> None:
    """ModelError where the reference reads token ids as other texts than the policy does."""
    model, base = start.model, start.base
    other = load_named(AutoTokenizer, str(model.reference), model)
    rows, rows_there = (
        load_named(AutoConfig, path, base).get_text_config().vocab_size for path in (base.path, str(model.reference))
    )
    differing = [f"rows of the embedding: {rows} and {rows_there}"] if rows != rows_there else []
    differing += token_differences(tokenizer, other)
    if differing:
        raise ModelError(
            f"model.reference={model.reference} has another vocabulary than model.path={model.path} "
            f"({'; '.join(differing)}): its log-probabilities would be those of other texts. Take a reference of the "
            "same tokenizer, or resize and save both models alike"
        )


def token_differences(tokenizer: Any, other: Any) -> list[str]:
    """Where two tokenizers give the same text other ids, or read the same ids as other text; empty where nowhere."""
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    moved = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    ends = (tokenizer.eos_token_id, other.eos_token_id)
    differing = [f"eos_token_id: {ends[0]} and {ends[1]}"] if ends[0] != ends[1] else []
    differing += [f"token {moved[0]!r}: {mine.get(moved[0])} and {theirs.get(moved[0])}"] if moved else []
    ids = [[each(text, add_special_tokens=False)["input_ids"] for text in SAMPLE] for each in (tokenizer, other)]
    return (
        differing + [f"{text!r} is encoded differently" for text, a, b in zip(SAMPLE, *ids, strict=True) if a != b][:1]
    )


def refuse_second_copy(start: Start) -> None:
    """ConfigError where the reference beside a new adapter has the very weights of the base."""
    model = start.model
    if model.tuning == "full" or start.adapter:
        return
    own, there = (sorted(Path(str(path)).expanduser().glob("*.safetensors")) for path in (model.path, model.reference))
    pairs = zip(own, there, strict=False)
    if own and len(own) == len(there) and all(filecmp.cmp(*pair, shallow=False) for pair in pairs):
        raise ConfigError(
            f"model.reference={model.reference} has the very weights of model.path={model.path}, which "
            f"model.tuning={model.tuning} has already (the policy with its adapter off): leave it out, and save a "
            "second model's memory"
        )
