"""Token ids of prompts and completions: read here once for every method, measure and judge.

A chat's ids are those of the tokenizer's own `apply_chat_template` over prompt and answer, tools and template arguments
in; the completion starts where they first differ from those of the prompt alone (TRL's rule,
`DPOTrainer._prepare_dataset`). Raw text ends in EOS. Where TRL's trainers differ from each other they are not followed:
its ORPO and CPO add a BOS and an EOS that the template does not write (huggingface/trl#1591, #4481), and all of them
double those that a raw text, or the tokenizer, has written already.
"""

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise, takewhile
from operator import eq, itemgetter
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_kit.model.chats import Messages, Prompt, prompt_of
from dpo_kit.model.control_tokens import MARKS, has_marks, is_neutral, neutral_chat
from dpo_kit.model.turns import outer_tokens


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completions: Sequence[Prompt]
) -> tuple[list[int], list[list[int]]]:
    """Token ids of one prompt and of its completions (EOS in), before truncation.

    `prompt` and `completions` are all text or all chat messages. Several completions share one prompt, the
    longest that is a prefix of each. Returns `(prompt_ids, [completion_ids, ...])`, in the order given.
    """
    return encode_rows(tokenizer, [prompt], [completions])[0]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], completions: Sequence[Sequence[Prompt]]
) -> list[tuple[list[int], list[list[int]]]]:
    """`encode` for many rows at once: one call of the tokenizer for all prompts, one for all completions.

    `completions[i]` are the completions of `prompts[i]`. All rows are text, or all are chat messages.
    """
    if not prompts:
        return []
    prompt_ids = encode_prompts(tokenizer, prompts)
    wholes = [_join(tokenizer, prompt, each) for prompt, row in zip(prompts, completions, strict=True) for each in row]
    whole_ids = _ids(tokenizer, wholes, prompting=False)
    bounds = accumulate((len(row) for row in completions), initial=0)
    return [_split(ids, whole_ids[start:end]) for ids, (start, end) in zip(prompt_ids, pairwise(bounds), strict=True)]


def ids_of_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], answers: Sequence[str]
) -> list[tuple[list[int], list[list[int]]]]:
    """The ids that prepared rows carry (data/ids.py), or those of rows as TRL's trainers take them, read here."""
    if rows and "ids" in rows[0]:
        return [(row["ids"]["prompt"].tolist(), [row["ids"][name].tolist() for name in answers]) for row in rows]
    return encode_rows(tokenizer, [prompt_of(row) for row in rows], [[row[name] for name in answers] for row in rows])


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of prompts as a model is asked to continue them: chat prompts with the generation prompt."""
    return _ids(tokenizer, prompts, prompting=True)


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer: without its end, with all that the model itself writes (`<think>`, `<tool_call>`), also
    where those are special tokens.
    """
    outer = set(tokenizer.convert_tokens_to_ids(list(outer_tokens(tokenizer))))
    return str(tokenizer.decode([token for token in ids if token not in outer]))


def truncate(prompt_ids: Sequence[int], completion_ids: list[int], max_length: int | None) -> list[int]:
    """The part of the completion that TRL trains on: prompt and completion cut at `max_length`
    (`keep_start`).

    Empty when the prompt alone fills `max_length` tokens; `None` cuts nothing.
    """
    if max_length is None:
        return completion_ids
    return completion_ids[: max(0, max_length - len(prompt_ids))]


def truncate_both(
    prompt_ids: list[int], completion_ids: list[int], max_length: int | None, mode: str = "keep_start"
) -> tuple[list[int], list[int]]:
    """Prompt and completion as TRL trains on them under `truncation_mode` ("keep_start" or "keep_end")."""
    if max_length is None:
        return prompt_ids, completion_ids
    if mode == "keep_start":
        return prompt_ids[:max_length], truncate(prompt_ids, completion_ids, max_length)
    kept = (prompt_ids + completion_ids)[-max_length:]
    start = max(0, len(kept) - len(completion_ids))
    return kept[:start], kept[start:]


def common_prefix_length(ids: Sequence[int], other_ids: Sequence[int]) -> int:
    """Number of leading tokens that two sequences have in common."""
    return sum(1 for _ in takewhile(bool, map(eq, ids, other_ids)))


def _join(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt) -> Prompt:
    if not isinstance(completion, str):
        return [*prompt, *completion]  # type: ignore[list-item]
    eos = tokenizer.eos_token or ""
    return f"{prompt}{completion}" if completion.rstrip().endswith(eos) else f"{prompt}{completion}{eos}"


def _ids(tokenizer: Any, inputs: Sequence[Any], *, prompting: bool) -> list[list[int]]:
    if not inputs:
        return []
    if isinstance(inputs[0], str):
        return _raw_ids(tokenizer, inputs)
    return encode_chats(tokenizer, inputs, prompting=prompting)


def encode_chats(tokenizer: Any, chats: Sequence[Messages], *, prompting: bool = False) -> list[list[int]]:
    """Token ids of whole chats, or of chats that a model is asked to go on with."""
    texts = render(tokenizer, chats, prompting=prompting)
    marked = {index for index, text in enumerate(texts) if is_neutral(tokenizer) and has_marks(text)}
    ids = _text_ids(tokenizer, ["" if index in marked else text for index, text in enumerate(texts)])
    for index in marked:
        ids[index] = tokenizer(texts[index], add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]
    return ids


def render(tokenizer: Any, chats: Sequence[Messages], *, prompting: bool) -> list[str]:
    """What the template writes for each chat, with a generation prompt where a model is asked; control tokens that are
    to stay text are marked (see control_tokens.py).
    """
    texts: list[str] = []
    for context, group in groupby((neutral_chat(tokenizer, chat) for chat in chats), itemgetter(1)):
        batch = [messages for messages, _ in group]
        options = {"tools": context.get("tools"), **context.get("chat_template_kwargs", {})}
        texts += tokenizer.apply_chat_template(batch, tokenize=False, add_generation_prompt=prompting, **options)
    return texts


def render_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[str]:
    """Prompts as text for a server that encodes them itself and knows no marks."""
    rendered = (
        render(tokenizer, [prompt], prompting=True)[0] if isinstance(prompt, list) else prompt for prompt in prompts
    )
    return [text.replace(MARKS[0], "").replace(MARKS[1], "") for text in rendered]


def _raw_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of text that is rendered already: with the BOS that the tokenizer adds, unless the text begins with it, and
    without the EOS that it adds, since a prompt goes on and an answer has its own.
    """
    before, after = _added(tokenizer)
    end = -1 if after == [tokenizer.eos_token_id] else None
    twice = tokenizer.bos_token if before == [tokenizer.bos_token_id] else None
    ids = _text_ids(tokenizer, texts, add_special_tokens=True)
    return [own[1 if twice and text.startswith(twice) else 0 : end] for text, own in zip(texts, ids, strict=True)]


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer itself sets before and after a text."""
    (plain,), (whole,) = _text_ids(tokenizer, ["a"]), _text_ids(tokenizer, ["a"], add_special_tokens=True)
    start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]


def _text_ids(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    """What `tokenizer(texts)` gives, from its backend where it has one: without masks and offsets it is much faster."""
    if not tokenizer.is_fast or tokenizer.split_special_tokens:
        return tokenizer(text=list(texts), add_special_tokens=add_special_tokens)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return [each.ids for each in backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]


def _split(prompt_ids: list[int], whole_ids: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    start = min((common_prefix_length(prompt_ids, ids) for ids in whole_ids), default=len(prompt_ids))
    return prompt_ids[:start], [ids[start:] for ids in whole_ids]
