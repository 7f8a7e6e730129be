"""Who answers a benchmark's prompts: any callable with a name; a local candidate, its answers kept one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from dpo_kit.errors import ConfigError, DataError
from dpo_kit.evaluate.candidate import Candidate
from dpo_kit.generation import as_messages
from dpo_kit.journal import Journal, key_of
from dpo_kit.run import hash_weights
from dpo_kit.verdicts import Prompt

FILE_NAME = r"[\w+-][\w.+-]*"


@dataclass(frozen=True)
class Speaker:
    """A model that answers: `answer(prompts, temperature)` gives one answer per prompt; temperature 0 is greedy."""

    name: str
    answer: Callable[[Sequence[Prompt], float], list[str]]


@dataclass(frozen=True)
class Voice:
    """How a local candidate answers; the same `Voice` gives the same answers on the same machine."""

    max_new_tokens: int
    chunk: int = 16  # prompts at a time
    seed: int = 0


def check_names(*names: str) -> None:
    """ConfigError where names of models, which become names of files, are no such names or are not distinct."""
    for name in names:
        if not re.fullmatch(FILE_NAME, name):
            raise ConfigError(f"a model's name becomes a file's: it takes letters, digits and . _ + -, got {name!r}")
    if len(set(names)) < len(names):
        raise ConfigError(f"two models are called {names[0]!r}: their results could not be told apart")


def identify(candidate: Candidate) -> str:
    """What a candidate's answers depend on: its weights (hub ids by revision), how they are loaded, its template."""
    model = candidate.model
    start = model.path if candidate.tuned else model.reference or model.path
    weights = [hash_weights(start) or f"{start}@{model.revision}", candidate.tuned and hash_weights(candidate.tuned)]
    loaded = [model.dtype, model.tuning, model.quantization if model.tuning == "qlora" else None]
    return key_of(weights, loaded, candidate.tokenizer().chat_template)


def on_device(candidate: Candidate) -> Any:
    """The candidate's weights where they compute fastest (4-bit ones are placed by their loading)."""
    from dpo_kit.hardware import has_accelerator

    weights = candidate.load()
    return weights.to("cuda") if has_accelerator() and candidate.model.tuning != "qlora" else weights


def local_speaker(candidate: Candidate, journal: Journal, voice: Voice) -> Speaker:
    """A speaker for `candidate`, loaded once something is to be answered; what `journal` has is not drawn again.

    DataError where prompts are messages, but the tokenizer has no chat template.
    """
    identity, loaded = identify(candidate), []  # type: ignore[var-annotated]

    def answer(prompts: Sequence[Prompt], temperature: float) -> list[str]:
        chunks = [list(prompts[start : start + voice.chunk]) for start in range(0, len(prompts), voice.chunk)]
        keys = [key_of("spoken", identity, voice.max_new_tokens, voice.seed, temperature, chunk) for chunk in chunks]
        missing = [index for index, key in enumerate(keys) if key not in journal.rows]
        if missing and not loaded:
            loaded.extend((on_device(candidate), candidate.tokenizer()))
        for index in tqdm(missing, desc=f"answers of {candidate.name}", unit="batch", disable=None):
            seed = int(key_of(voice.seed, temperature, chunks[index])[:15], 16)  # the same for every model
            texts = _draw(loaded[0], loaded[1], chunks[index], temperature, voice.max_new_tokens, seed)
            journal.add(keys[index], {"texts": texts})
        return [text for key in keys for text in journal.rows[key]["texts"]]

    return Speaker(candidate.name, answer)


def _draw(
    model: Any, tokenizer: Any, prompts: list[Prompt], temperature: float, max_new_tokens: int, seed: int
) -> list[str]:
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper

    from dpo_kit.sampling import draw_samples

    warper = TemperatureLogitsWarper(float(temperature)) if temperature else TopKLogitsWarper(1)
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        drawn = draw_samples(
            model, tokenizer, _rows(tokenizer, prompts), max_new_tokens=max_new_tokens, batch_size=len(prompts),
            processor=lambda _: warper,
        )  # fmt: skip
    return [sample.text for sample in drawn]


def _rows(tokenizer: Any, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    if tokenizer.chat_template is not None:
        return [{"prompt": as_messages(prompt)} for prompt in prompts]
    if any(not isinstance(prompt, str) for prompt in prompts):
        raise DataError(
            f"the prompts are chat messages, but the tokenizer of {tokenizer.name_or_path} has no chat template: use "
            "an instruct model, or prompts that are text"
        )
    return [{"prompt": prompt} for prompt in prompts]
