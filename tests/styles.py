# ruff: noqa: E501 - templates as they are written
"""Chat templates in the manner of a dozen model families, each with a byte-level tokenizer that has its control tokens.

`TAKES` says what a style's template writes beside plain turns of user and assistant.
"""

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{%- if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "Tools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif -%}"
    "{% for m in messages %}{% if not (loop.first and tools and m.role == 'system') %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}\n<tool_call>\n{{ call.function | tojson }}\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{{ tools | tojson(indent=4) }}<|eot_id|>"
    "{% endif %}{% for m in messages %}{% set role = 'ipython' if m.role == 'tool' else m.role %}"
    "<|start_header_id|>{{ role }}<|end_header_id|>\n\n{% if m.tool_calls %}<|python_tag|>"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}{{ bos_token }}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {% if loop.last or (loop.revindex == 2 and turns[-1].role == 'assistant') %}"
    "{{ system + '\n\n' if system else '' }}{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}\n</tools><|im_end|>\n{% endif %}{% for m in messages %}{% set text = m.content or '' %}"
    "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n"
    "{{ text.lstrip('\n') }}{% else %}{{ text }}{% endif %}{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ text }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<｜User｜>{{ m.content }}{% else %}{% set text = m.content %}{% if '</think>' in text %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}<｜Assistant｜>{{ text }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n" + CHATML
STRICT = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') or (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('only user/assistant/user/…') }}{% endif %}{{ '### Human: ' if m.role == 'user' else '### AI: ' }}"
    "{{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}### AI:{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.reasoning_content and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
THINK, CALL = ["<think>", "</think>"], ["<tool_call>", "</tool_call>"]
IM = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
STYLES: dict[str, tuple[str, str | None, str, list[str], list[str]]] = {  # template, bos, eos, special, other added tokens
    "chatml": (CHATML, None, "<|im_end|>", [*IM, *CALL], []),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>",
               ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"], []),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], ["\n\n"]),
    "mistral": (MISTRAL, "<s>", "</s>", ["<s>", "</s>", "[INST]", "[/INST]"], []),
    "qwen3": (QWEN3, None, "<|im_end|>", IM, [*THINK, *CALL, "<tool_response>", "</tool_response>"]),
    "phi3": (PHI3, "<s>", "<|endoftext|>", ["<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"], []),
    "zephyr": (ZEPHYR, "<s>", "</s>", ["<s>", "</s>"], []),
    "r1": (R1, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
           ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"], THINK),
    "dated": (DATED, None, "<|im_end|>", [*IM, *THINK, *CALL], []),
    "strict": (STRICT, "<s>", "</s>", ["<s>", "</s>"], []),
    "harmony": (HARMONY, "<|startoftext|>", "<|return|>",
                ["<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"], []),
}  # fmt: skip
TAKES: dict[str, set[str]] = {
    "chatml": {"system", "tools"},
    "llama3": {"system", "tools"},
    "gemma": set(),
    "mistral": {"system"},
    "qwen3": {"system", "tools", "reasoning_content"},
    "phi3": {"system"},
    "zephyr": {"system"},
    "r1": {"system"},
    "dated": {"system", "tools"},
    "strict": set(),
    "harmony": {"system", "reasoning_content"},
}
CORPUS = [
    "the rain in the town of Spain",
    "und der Regen",
    "дождь",
    "雨が降る",
    "المطر",
    "\n\n  return x\n",
    "user assistant",
]


@cache
def _core(special: tuple[str, ...], other: tuple[str, ...]) -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>"], vocab_size=330, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in other])
    return core.to_str()


def tokenizer(style: str, *, adds: str = "") -> PreTrainedTokenizerFast:
    """A fresh tokenizer; `adds` may name what it sets around a text: "bos", "eos" or both."""
    template, bos, eos, special, other = STYLES[style]
    core = Tokenizer.from_str(_core(tuple(special), tuple(other)))
    around = [f"{bos} " if "bos" in adds else "", f" {eos}" if "eos" in adds else ""]
    if adds:
        known: list[Any] = [(token, core.token_to_id(token)) for token in (bos, eos) if token]
        core.post_processor = processors.TemplateProcessing(single="$A".join(around), special_tokens=known)
    named = {} if bos is None else {"bos_token": bos}
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token="<pad>", **named)
    made.chat_template = template
    return made
