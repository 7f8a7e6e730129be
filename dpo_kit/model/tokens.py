"""Token ids of prompts and completions: read here once for every method, measure and judge, and cut here.

A chat's ids are those of the tokenizer's own `apply_chat_template` over prompt and answer, tools and template arguments
in; the completion starts where they first differ from those of the prompt alone (TRL's rule,
`DPOTrainer._prepare_dataset`). Raw text ends in EOS. Where TRL's trainers differ from each other they are not followed:
its ORPO and CPO add a BOS and an EOS that the template does not write (huggingface/trl#1591, #4481), and all of them
double those that a raw text, or the tokenizer, has written already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise, takewhile
from operator import eq, itemgetter
from types import SimpleNamespace
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from dpo_kit.model.chats import Messages, Prompt, prompt_of
from dpo_kit.model.turns import MARKS, has_marks, is_neutral, neutral_chat, outer_tokens

Ids = TypeVar("Ids", list[int], range)


@dataclass(frozen=True)
class Truncation:
    """How TRL's trainers cut a prompt with its completion to `max_length` tokens (None: not at all): they keep the
    start, or the end where `mode` is "keep_end".
    """

    max_length: int | None
    mode: str = "keep_start"

    @classmethod
    def of(cls, trl: Any) -> Truncation:
        """That of TRL's arguments, an object or the `trl` block; ORPO and CPO have no mode: they keep the start."""
        given = SimpleNamespace(**trl) if isinstance(trl, Mapping) else trl
        return cls(given.max_length, getattr(given, "truncation_mode", None) or "keep_start")

    def cut(self, prompt: Ids, completion: Ids) -> tuple[Ids, Ids]:
        """What is left of both; nothing of the completion where the prompt alone fills `max_length`."""
        if self.max_length is None:
            return prompt, completion
        if self.mode == "keep_start":
            return prompt[: self.max_length], completion[: max(0, self.max_length - len(prompt))]
        gone = len(prompt) + len(completion) - self.max_length
        return prompt[max(0, gone) :], completion[max(0, gone - len(prompt)) :]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], completions: Sequence[Sequence[Prompt]]
) -> list[tuple[list[int], list[list[int]]]]:
    """Token ids of prompts and of their completions (EOS in), before truncation: one call of the tokenizer for each.

    `completions[i]` are the completions of `prompts[i]`, which share one prompt, the longest that is a prefix of each.
    All rows are text, or all are chat messages. Returns `(prompt_ids, [completion_ids, ...])` of each.
    """
    eos = tokenizer.eos_token or ""
    wholes: list[Any] = []
    for prompt, row in zip(prompts, completions, strict=True):
        for answer in row:
            if isinstance(answer, str):
                wholes.append(f"{prompt}{answer}{'' if answer.rstrip().endswith(eos) else eos}")
            else:
                wholes.append([*prompt, *answer])
    prompt_ids, whole_ids = encode_prompts(tokenizer, prompts), _ids(tokenizer, wholes, prompting=False)
    encoded = []
    bounds = pairwise(accumulate((len(row) for row in completions), initial=0))
    for ids, (first, end) in zip(prompt_ids, bounds, strict=True):
        start = min((common_prefix_length(ids, whole) for whole in whole_ids[first:end]), default=len(ids))
        encoded.append((ids[:start], [whole[start:] for whole in whole_ids[first:end]]))
    return encoded


def ids_of_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], answers: Sequence[str]
) -> list[tuple[list[int], list[list[int]]]]:
    """The ids that prepared rows carry (data/shape.py), or those of rows as TRL's trainers take them, read here."""
    if rows and "ids" in rows[0]:
        return [(row["ids"]["prompt"].tolist(), [row["ids"][name].tolist() for name in answers]) for row in rows]
    return encode_rows(tokenizer, [prompt_of(row) for row in rows], [[row[name] for name in answers] for row in rows])


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of prompts as a model is asked to continue them: chat prompts with the generation prompt."""
    return _ids(tokenizer, prompts, prompting=True)


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer without its end, with what the model itself writes (`<think>`), special tokens too."""
    outer = set(tokenizer.convert_tokens_to_ids(list(outer_tokens(tokenizer))))
    return str(tokenizer.decode([token for token in ids if token not in outer]))


def common_prefix_length(ids: Sequence[int], other_ids: Sequence[int]) -> int:
    """Number of leading tokens that two sequences have in common."""
    return sum(1 for _ in takewhile(bool, map(eq, ids, other_ids)))


def _ids(tokenizer: Any, inputs: Sequence[Any], *, prompting: bool) -> list[list[int]]:
    """Of chats, or of text that is rendered already: with the BOS that the tokenizer adds, unless the text begins with
    it, and without the EOS that it adds, since a prompt goes on and an answer has its own.
    """
    if not inputs or not isinstance(inputs[0], str):
        return encode_chats(tokenizer, inputs, prompting=prompting) if inputs else []
    (plain,), (whole,) = _text_ids(tokenizer, ["a"]), _text_ids(tokenizer, ["a"], add_special_tokens=True)
    at = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    end = -1 if whole[at + len(plain) :] == [tokenizer.eos_token_id] else None
    twice = tokenizer.bos_token if whole[:at] == [tokenizer.bos_token_id] else None
    ids = _text_ids(tokenizer, inputs, add_special_tokens=True)
    return [own[1 if twice and text.startswith(twice) else 0 : end] for text, own in zip(inputs, ids, strict=True)]


def encode_chats(tokenizer: Any, chats: Sequence[Messages], *, prompting: bool = False) -> list[list[int]]:
    """Token ids of whole chats, or of chats that a model is asked to go on with."""
    texts = render(tokenizer, chats, prompting=prompting)
    marked = {index for index, text in enumerate(texts) if is_neutral(tokenizer) and has_marks(text)}
    ids = _text_ids(tokenizer, ["" if index in marked else text for index, text in enumerate(texts)])
    for index in marked:
        ids[index] = tokenizer(texts[index], add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]
    return ids


def render(tokenizer: Any, chats: Sequence[Messages], *, prompting: bool) -> list[str]:
    """What the template writes for each chat; control tokens that are to stay text are marked (turns.py)."""
    texts: list[str] = []
    for context, group in groupby((neutral_chat(tokenizer, chat) for chat in chats), itemgetter(1)):
        batch = [messages for messages, _ in group]
        options = {"tools": context.get("tools"), **context.get("chat_template_kwargs", {})}
        texts += tokenizer.apply_chat_template(batch, tokenize=False, add_generation_prompt=prompting, **options)
    return texts


def render_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[str]:
    """Prompts as text for a server that encodes them itself and knows no marks."""
    texts = (each if isinstance(each, str) else render(tokenizer, [each], prompting=True)[0] for each in prompts)
    return [text.replace(MARKS[0], "").replace(MARKS[1], "") for text in texts]


def _text_ids(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    """What `tokenizer(texts)` gives, from its backend where it has one: without masks and offsets it is much faster."""
    if not tokenizer.is_fast or tokenizer.split_special_tokens:
        return tokenizer(text=list(texts), add_special_tokens=add_special_tokens)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return [each.ids for each in backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]
