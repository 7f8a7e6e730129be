"""Token ids of prompts and completions, exactly as TRL's DPOTrainer and KTOTrainer would train on them.

The rule is TRL's (`DPOTrainer._prepare_dataset`): chat rows go through the tokenizer's template, text
completions end in EOS, and the completion starts where the tokens of the prompt and of prompt + completion
first differ.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise, takewhile
from operator import eq
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_kit.control_tokens import has_marks

Messages = list[dict[str, Any]]
Text = str | Messages  # plain text, or chat messages with "role" and "content"


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completions: Sequence[Text],
    template_kwargs: dict[str, Any] | None = None,
) -> tuple[list[int], list[list[int]]]:
    """Token ids of one prompt and of its completions (EOS in), as TRL's DPOTrainer trains on them before
    truncation.

    `prompt` and `completions` are all text or all chat messages. Several completions share one prompt, the
    longest that is a prefix of each. `template_kwargs` reach `apply_chat_template` (TRL's column
    `chat_template_kwargs`). Returns `(prompt_ids, [completion_ids, ...])`, in the order given.
    """
    return encode_rows(tokenizer, [prompt], [completions], template_kwargs)[0]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    completions: Sequence[Sequence[Text]],
    template_kwargs: dict[str, Any] | None = None,
) -> list[tuple[list[int], list[list[int]]]]:
    """`encode` for many rows at once: one call of the tokenizer for all prompts, one for all completions.

    `completions[i]` are the completions of `prompts[i]`. All rows are text, or all are chat messages.
    """
    if not prompts:
        return []
    prompt_ids = encode_prompts(tokenizer, prompts, template_kwargs)
    wholes = [_join(tokenizer, prompt, each) for prompt, row in zip(prompts, completions, strict=True) for each in row]
    whole_ids = _ids(tokenizer, wholes, add_generation_prompt=False, template_kwargs=template_kwargs)
    bounds = accumulate((len(row) for row in completions), initial=0)
    return [_split(ids, whole_ids[start:end]) for ids, (start, end) in zip(prompt_ids, pairwise(bounds), strict=True)]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """Token ids of prompts as a model is asked to continue them: chat prompts with the generation prompt."""
    return _ids(tokenizer, prompts, add_generation_prompt=True, template_kwargs=template_kwargs)


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


def _join(tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text) -> Text:
    if not isinstance(completion, str):
        return [*prompt, *completion]  # type: ignore[list-item]
    eos = tokenizer.eos_token or ""
    return f"{prompt}{completion}" if completion.endswith(eos) else f"{prompt}{completion}{eos}"


def _ids(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[Text],
    *,
    add_generation_prompt: bool,
    template_kwargs: dict[str, Any] | None,
) -> list[list[int]]:
    if not inputs:
        return []
    batch: Any = list(inputs)
    if isinstance(inputs[0], str):
        return _text_ids(tokenizer, batch, add_special_tokens=True)
    kwargs = {"add_generation_prompt": add_generation_prompt, **(template_kwargs or {})}
    texts: Any = tokenizer.apply_chat_template(batch, tokenize=False, **kwargs)
    return _text_ids(tokenizer, texts, add_special_tokens=False)  # the template writes them


def _text_ids(tokenizer: Any, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    """What `tokenizer(texts)` gives, from its backend where it has one: without masks and offsets it is much faster."""
    if not tokenizer.is_fast or tokenizer.split_special_tokens or has_marks(texts):
        return tokenizer(text=texts, add_special_tokens=add_special_tokens)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


def _split(prompt_ids: list[int], whole_ids: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    start = min((common_prefix_length(prompt_ids, ids) for ids in whole_ids), default=len(prompt_ids))
    return prompt_ids[:start], [ids[start:] for ids in whole_ids]
