"""Answers to many prompts from local models and from servers, kept one by one, so that a killed pass goes on.

A local model answers in fixed chunks of prompts, each with a random state of its own: an answer depends on its chunk
and on the seed, never on where a pass was interrupted. (Padding moves log-probabilities by a little, so that the
same prompt in another chunk may get another answer.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

from dpo_kit.config.building import Answers, LocalAnswers
from dpo_kit.config.settings import Model
from dpo_kit.errors import DataError
from dpo_kit.judge.server import Request, Server
from dpo_kit.model.chats import Prompt, as_messages, split_context
from dpo_kit.run.files import hash_weights
from dpo_kit.run.journal import Journal, key_of
from dpo_kit.run.quiet import bar, quiet_imports, quiet_libraries

CHUNK = 64  # prompts of a local model at a time


@dataclass(frozen=True)
class Answer:
    """One answer: its text, whether the token limit cut it, and who gave it (`model at temperature`). `calls` are those
    that a server has told apart from the text; then `text` is how a judge reads them.
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
    """How prompts are asked: the same `Asking` gives the same answers of a local model on a machine with as much
    memory free.
    """

    max_new_tokens: int
    seed: int = 0
    top_p: float | None = None  # the share of the probability that is drawn from; None: all of it

    @property
    def identity(self) -> list[Any]:
        """What an answer depends on."""
        return [self.max_new_tokens, self.seed, *([] if self.top_p is None else [self.top_p])]


@dataclass(frozen=True)
class LocalModel:
    """A model that is sampled here, opened once something is drawn; its answers are kept under `identity`."""

    name: str
    identity: list[Any]
    open: Callable[[], tuple[Any, Any]]
    wrap: bool = True  # text prompts become a user turn where the tokenizer has a chat template


def draw_answers(
    source: Answers, model: Model, prompts: Sequence[Prompt], asking: Asking, journal: Journal
) -> tuple[list[list[Answer | None]], dict[str, Any]]:
    """For each prompt the answers of `source` (one a temperature and draw; None where it failed), and what they cost.
    `model` says how a local one is loaded. What `journal` has is not drawn again. Raises ModelError, DataError.
    """
    asking = replace(asking, top_p=source.top_p)
    if isinstance(source, LocalAnswers):
        local = _local_model(source, model)
        return draw_locally(local, source.temperatures, source.draws, prompts, asking, journal), {}
    turns = [(temperature, draw) for temperature in source.temperatures for draw in range(source.draws)]
    requests = []
    for prompt in prompts:  # one after the other, so that a pass that stops has whole prompts
        messages, context = split_context(as_messages(prompt))
        for turn in turns:
            key = key_of("answer", source.model, *turn, *asking.identity, prompt)
            seed = int(key[:7], 16)  # of its own, so that two draws differ on a server that honours seeds
            requests.append(Request(key, messages, asking.max_new_tokens, turn[0], seed, context, asking.top_p))
    server = Server(source, journal)
    server.ask(requests, f"answers of {source.model}")
    return _read(journal, source.model, turns, [request.key for request in requests]), server.spend()


def draw_locally(
    local: LocalModel, temperatures: Sequence[float | None], draws: int, prompts: Sequence[Prompt], asking: Asking,
    journal: Journal,
) -> list[list[Answer | None]]:  # fmt: skip
    """For each prompt the answers of `local`, `draws` at each temperature. What `journal` has is not drawn again."""
    identity = [*local.identity, *asking.identity]
    turns = [(temperature, draw) for temperature in temperatures for draw in range(draws)]
    batches, keys = [], []  # keys: prompt by prompt, each with all its turns
    for start in range(0, len(prompts), CHUNK):
        chunk = list(prompts[start : start + CHUNK])
        content = key_of(chunk)
        of_turns = [[key_of(identity, *turn, content, prompt) for prompt in chunk] for turn in turns]
        batches += [(chunk, content, *batch) for batch in zip(turns, of_turns, strict=True)]
        keys += [key for of_prompt in zip(*of_turns, strict=True) for key in of_prompt]
    missing = [batch for batch in batches if not all(key in journal.rows for key in batch[-1])]
    if missing:
        quiet_imports()
        quiet_libraries()
        model, tokenizer = local.open()
        templated = tokenizer.chat_template is not None
        if not templated and any(not isinstance(prompt, str) for prompt in prompts):
            raise DataError(
                f"the prompts are chat messages, but the tokenizer of {tokenizer.name_or_path} has no chat template: "
                "use an instruct model, or prompts that are text"
            )
        with bar(sum(len(batch[-1]) for batch in missing), f"answers of {local.name}", "answer") as progress:
            for chunk, content, turn, of_turn in missing:
                seed = int(key_of(asking.seed, *turn, content)[:15], 16)
                rows = [{"prompt": as_messages(prompt) if templated and local.wrap else prompt} for prompt in chunk]
                samples = _sample(model, tokenizer, rows, turn[0], asking, seed)
                answers = [{"text": sample.text, "cut": sample.cut} for sample in samples]
                journal.add_all(dict(zip(of_turn, answers, strict=True)))
                progress.update(len(answers))
    return _read(journal, local.name, turns, keys)


def _read(
    journal: Journal, name: str, turns: Sequence[tuple[float | None, int]], keys: Sequence[str]
) -> list[list[Answer | None]]:
    """For each prompt its answers, one a turn; None where there is none. `keys` are those of the first prompt's turns,
    of the second one's, …
    """
    sources = [f"{name} {'as it samples' if t is None else f'at {t:g}'}" for t, _ in turns]
    rows = zip(map(journal.rows.get, keys), cycle(sources))
    answers = [
        Answer(row["text"], row["cut"], source, tuple(row.get("calls", ()))) if row else None for row, source in rows
    ]
    return [answers[start : start + len(turns)] for start in range(0, len(answers), len(turns))]


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


def _sample(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], temperature: float | None, asking: Asking, seed: int
) -> list[Any]:
    """One sample per row, from `seed`; temperature 0: greedy, None: the model's own config."""
    import torch
    from transformers import GenerationConfig

    from dpo_kit.model.sampling import Shaped, draw_samples

    shape = Shaped(GenerationConfig(do_sample=False))
    if temperature is None:
        shape = Shaped(model.generation_config)
    elif temperature:
        own = {"temperature": float(temperature), "top_p": asking.top_p, "top_k": 0}
        shape = Shaped(GenerationConfig(do_sample=True, **own))
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return draw_samples(model, tokenizer, rows, processor=lambda _: shape, max_new_tokens=asking.max_new_tokens)
