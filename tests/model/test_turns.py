"""What a chat template writes around turns, written down by hand for a dozen of them; where answers end."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from dpo_kit.model.sampling import draw_samples
from dpo_kit.model.tokens import decode_answer
from dpo_kit.model.turns import leaves_out, neutralised, stop_ids, turns_of
from tests import styles, tiny

TURNS = {  # of each style: the token that ends an answer, and all that open or end a turn
    "chatml": ("<|im_end|>", {"<|im_start|>", "<|im_end|>"}),
    "llama3": ("<|eot_id|>", {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}),
    "gemma": ("<end_of_turn>", {"<bos>", "<start_of_turn>", "<end_of_turn>"}),
    "mistral": ("</s>", {"<s>", "[INST]", "[/INST]", "</s>"}),
    "qwen3": ("<|im_end|>", {"<|im_start|>", "<|im_end|>"}),
    "phi3": ("<|end|>", {"<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"}),
    "zephyr": ("</s>", {"</s>"}),
    "r1": ("<｜end▁of▁sentence｜>", set(styles.STYLES["r1"][3])),
    "dated": ("<|im_end|>", {"<|im_start|>", "<|im_end|>"}),
    "strict": ("</s>", {"</s>"}),
    "harmony": ("<|return|>", {"<|start|>", "<|message|>", "<|end|>", "<|return|>"}),
}


@pytest.mark.parametrize("style", styles.STYLES)
def test_the_tokens_of_turns_and_the_end_of_an_answer_are_found(style: str) -> None:
    found = turns_of(styles.tokenizer(style))
    assert (found.end, set(found.tokens)) == TURNS[style]


@pytest.mark.parametrize("style", styles.STYLES)
def test_what_a_template_passes_over_is_found(style: str) -> None:
    takes = styles.TAKES[style]
    parts = {"tools": "tools", "tool_calls": "tools", "reasoning_content": "reasoning_content"}
    tokenizer = styles.tokenizer(style)
    assert {part for part in parts if leaves_out(tokenizer, part)} == {
        p for p, kind in parts.items() if kind not in takes
    }
    assert not leaves_out(tokenizer, "system")  # written, or refused in words
    tokenizer.chat_template = tokenizer.chat_template.replace("tools", "nothing")
    assert leaves_out(tokenizer, "tools")  # asked of the template that is there now


def test_a_template_without_an_end_has_none_and_one_that_refuses_ends_as_texts_do() -> None:
    tokenizer = styles.tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert turns_of(tokenizer).end is None and stop_ids(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert turns_of(tokenizer).end == "<|im_end|>"


def test_answers_stop_at_the_tokenizer_s_the_template_s_and_the_model_s_ends() -> None:
    tokenizer = styles.tokenizer("phi3")
    model: Any = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(eos_token_id=3)),
        generation_config=SimpleNamespace(eos_token_id=[4, 5]),
    )
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|end|>")]
    assert stop_ids(tokenizer) == sorted(ends)
    assert stop_ids(neutralised(tokenizer, [7])) == sorted([*ends, 7])
    assert stop_ids(tokenizer, model) == sorted([*ends, 3, 4, 5, 7])


@pytest.mark.parametrize("where", ["template", "generation_config"])
def test_samples_end_at_a_token_that_ends_a_turn(where: str) -> None:
    """A model that says the same token twice of three times; until that is an end, all its answers are cut."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    favourite = tokenizer.convert_tokens_to_ids("cat")

    def favour(module: Any, inputs: Any, output: Any) -> Any:
        output.logits[..., favourite] = output.logits.logsumexp(-1) + torch.log(torch.tensor(2.0))
        return output

    model.register_forward_hook(favour)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("red", "blue", "two", "dog") * 3]

    def lengths() -> list[int]:
        torch.manual_seed(0)
        drawn = draw_samples(model, tokenizer, rows, max_new_tokens=40)
        assert all(each.cut or each.token_ids[-1] in (favourite, 1) for each in drawn)
        return sorted(40 if each.cut else len(each.token_ids) for each in drawn)

    before = lengths()
    if where == "template":
        tokenizer.add_special_tokens({"additional_special_tokens": ["cat"]})
        tokenizer.chat_template = tiny.TEMPLATE.replace("<eos>", " cat ")
    else:
        model.generation_config = GenerationConfig(eos_token_id=[favourite])
    assert before[len(before) // 2] > 8 > lengths()[-1]


def test_an_answer_s_text_keeps_what_the_model_writes_in_special_tokens_and_loses_its_end() -> None:
    tokenizer = styles.tokenizer("chatml")
    text = '<tool_call>\n{"name": "weather"}\n</tool_call>'
    ids = tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"]
    assert decode_answer(tokenizer, [*ids, tokenizer.pad_token_id]) == text
    assert "<tool_call>" not in tokenizer.decode(ids, skip_special_tokens=True)
