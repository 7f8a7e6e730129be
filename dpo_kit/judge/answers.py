"""Answers to many prompts from local models and from servers, kept one by one, so that a killed pass goes on.

A local model answers in fixed chunks of prompts, each with a random state of its own: an answer depends on its chunk
and on the seed, never on where a pass was interrupted. (Padding moves log-probabilities by a little, so that the
same prompt in another chunk may get another answer.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from dpo_kit.config.settings import Answers, LocalAnswers, Model, ServerAnswers
from dpo_kit.errors import DataError
from dpo_kit.judge.server import Request, Server
from dpo_kit.model.chats import Prompt, as_messages, split_context
from dpo_kit.run.files import hash_weights
from dpo_kit.run.journal import Journal, key_of
from dpo_kit.run.quiet import quiet_imports, quiet_libraries

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """One answer: its text, whether the token limit cut it, and who gave it (`model at temperature`).

    `calls` are those that a server has told apart from the text; then `text` is how a judge reads them.
    """

    text: str
    cut: bool
    source: str
    calls: tuple[dict[str, Any], ...] = ()

    def in_form_of(self, prompt: Prompt) -> Prompt:
        """Text for a text prompt, one assistant message for a chat prompt."""
        if isinstance(prompt, str):
            return self.text
        said: dict[str, Any] = {"content": "", "tool_calls": list(self.calls)} if self.calls else {"content": self.text}
        return [{"role": "assistant"} | said]


@dataclass(frozen=True)
class Asking:
    """How prompts are asked: the same `Asking` gives the same answers of a local model on the same machine."""

    max_new_tokens: int
    chunk: int = 32  # prompts of a local model at a time
    seed: int = 0


@dataclass(frozen=True)
class LocalModel:
    """A model that is sampled here, opened (model, tokenizer) only once something is to be drawn.

    Its answers are kept under `identity`, so that equal identities are sampled once.
    """

    name: str
    identity: list[Any]
    open: Callable[[], tuple[Any, Any]]
    wrap: bool = True  # text prompts become a user turn where the tokenizer has a chat template


@dataclass(frozen=True)
class Turn:
    """One model, temperature and draw, in which every prompt gets one answer."""

    temperature: float
    draw: int


def draw_answers(
    source: Answers, model: Model, prompts: Sequence[Prompt], asking: Asking, journal: Journal
) -> tuple[list[list[Answer | None]], dict[str, Any]]:
    """For each prompt the answers of `source` (one a temperature and draw; None where it failed), and what they cost.

    `model` says how a local one is loaded. What `journal` has is not drawn again. Raises ModelError, DataError.
    """
    if isinstance(source, LocalAnswers):
        local = _local_model(source, model)
        return draw_locally(local, source.temperatures, source.draws, prompts, asking, journal), {}
    turns = _turns(source.temperatures, source.draws)
    keys, spend = _ask_server(source, prompts, asking, turns, journal)
    return _answers(journal, keys, turns, source.model), spend


def draw_locally(
    local: LocalModel,
    temperatures: Sequence[float],
    draws: int,
    prompts: Sequence[Prompt],
    asking: Asking,
    journal: Journal,
) -> list[list[Answer | None]]:
    """For each prompt the answers of `local`, `draws` at each temperature. What `journal` has is not drawn again."""
    turns = _turns(temperatures, draws)
    return _answers(journal, _draw_local(local, prompts, asking, turns, journal), turns, local.name)


def _turns(temperatures: Sequence[float], draws: int) -> list[Turn]:
    return [Turn(temperature, draw) for temperature in temperatures for draw in range(draws)]


def _answers(journal: Journal, keys: dict[Turn, list[str]], turns: list[Turn], name: str) -> list[list[Answer | None]]:
    answers = [[_answer(journal, key, f"{name} at {turn.temperature:g}") for key in keys[turn]] for turn in turns]
    return [list(each) for each in zip(*answers, strict=True)]


def _answer(journal: Journal, key: str, source: str) -> Answer | None:
    row = journal.rows.get(key)
    return None if row is None else Answer(row["text"], row["cut"], source, tuple(row.get("calls", ())))


# --- a local model -----------------------------------------------------------------------------------------------


def _draw_local(
    local: LocalModel, prompts: Sequence[Prompt], asking: Asking, turns: list[Turn], journal: Journal
) -> dict[Turn, list[str]]:
    """The keys of all answers, by turn and in the order of the prompts, once the missing ones are drawn."""
    identity = [*local.identity, asking.max_new_tokens, asking.seed]
    chunks = [list(prompts[start : start + asking.chunk]) for start in range(0, len(prompts), asking.chunk)]
    contents = [key_of(chunk) for chunk in chunks]
    keys = {
        (turn, number): [key_of(identity, turn.temperature, turn.draw, contents[number], each) for each in chunk]
        for number, chunk in enumerate(chunks)
        for turn in turns
    }
    missing = [place for place, own in keys.items() if not all(key in journal.rows for key in own)]
    if missing:
        sampler = _Sampler(local)
        todo = sum(len(keys[place]) for place in missing)
        with tqdm(total=todo, desc=f"answers of {local.name}", unit="answer", disable=None) as bar:
            for turn, number in missing:
                seed = int(key_of(asking.seed, turn.temperature, turn.draw, contents[number])[:15], 16)
                drawn = sampler.sample(chunks[number], turn.temperature, asking.max_new_tokens, seed)
                rows = [{"text": sample.text, "cut": sample.cut} for sample in drawn]
                journal.add_all(dict(zip(keys[turn, number], rows, strict=True)))
                bar.update(len(drawn))
    return {turn: [key for number in range(len(chunks)) for key in keys[turn, number]] for turn in turns}


def _local_model(source: LocalAnswers, model: Model) -> LocalModel:
    """The model at `source.path`, loaded as `model` says."""
    from dpo_kit.model.load import load_tokenizer
    from dpo_kit.model.turns import written_today

    own = {"path": source.path, "reference": None, "tuning": "full", "dtype": source.dtype}
    settings = model.model_copy(update=own if source.path == model.path else own | {"revision": None})

    def open_model() -> tuple[Any, Any]:
        from dpo_kit.model.hardware import has_accelerator, training_precision
        from dpo_kit.model.load import load_reference

        dtype = training_precision() if source.dtype == "auto" else source.dtype
        weights: Any = load_reference(settings.model_copy(update={"dtype": dtype}))
        return weights.to("cuda" if has_accelerator() else "cpu"), load_tokenizer(settings)

    weights = hash_weights(source.path) or source.path
    return LocalModel(source.path, [weights, source.dtype, *written_today(load_tokenizer(settings))], open_model)


class _Sampler:
    """An open model and its tokenizer, ready to sample."""

    def __init__(self, local: LocalModel) -> None:
        quiet_imports()
        quiet_libraries()
        self.wrap = local.wrap
        self.model, self.tokenizer = local.open()

    def sample(self, prompts: Sequence[Prompt], temperature: float, max_new_tokens: int, seed: int) -> list[Any]:
        """One sample per prompt, all in one batch, from the random state `seed`; temperature 0 is greedy."""
        import torch
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper

        from dpo_kit.model.sampling import draw_samples

        warper = TemperatureLogitsWarper(float(temperature)) if temperature else TopKLogitsWarper(1)
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            return draw_samples(
                self.model,
                self.tokenizer,
                self._rows(prompts),
                max_new_tokens=max_new_tokens,
                batch_size=len(prompts),
                processor=lambda _: warper,
            )

    def _rows(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        if self.tokenizer.chat_template is not None:
            return [{"prompt": as_messages(prompt) if self.wrap else prompt} for prompt in prompts]
        if any(not isinstance(prompt, str) for prompt in prompts):
            raise DataError(
                f"the prompts are chat messages, but the tokenizer of {self.tokenizer.name_or_path} has no chat "
                "template: use an instruct model, or prompts that are text"
            )
        return [{"prompt": prompt} for prompt in prompts]


# --- a server ----------------------------------------------------------------------------------------------------


def _ask_server(
    source: ServerAnswers, prompts: Sequence[Prompt], asking: Asking, turns: list[Turn], journal: Journal
) -> tuple[dict[Turn, list[str]], dict[str, Any]]:
    server = Server(source, journal)
    requests = {turn: list(_requests(source, prompts, asking, turn)) for turn in turns}
    by_prompt = zip(*requests.values(), strict=True)  # so that a pass that stops has whole prompts
    server.ask([each for own in by_prompt for each in own], f"answers of {source.model}")
    return {turn: [each.key for each in requests[turn]] for turn in turns}, server.spend()


def _requests(source: ServerAnswers, prompts: Sequence[Prompt], asking: Asking, turn: Turn) -> Iterator[Request]:
    for prompt in prompts:
        key = key_of("answer", source.model, turn.temperature, turn.draw, asking.max_new_tokens, asking.seed, prompt)
        seed = int(key[:7], 16)  # of its own, so that two draws differ on a server that honours seeds
        messages, context = split_context(as_messages(prompt))
        yield Request(key, messages, asking.max_new_tokens, turn.temperature, seed, context)
