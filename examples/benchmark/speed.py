"""Training time of dpo_kit beside stock `trl dpo`, on the same pairs, taken in turns; what `make bench` prints.

    python examples/benchmark/speed.py [part=single,sweep,lora,levers,limit,scaling] [repeats=3] [out=speed.json]

The model has random weights (Qwen2, 5.5M parameters; nothing here depends on what it says), the pairs are random words of
two shapes: prompt-heavy (145 tokens of prompt, 46 and 58 of answers) and answer-heavy (57, 617, 514), with log-normal
lengths. Nobody evaluates or saves checkpoints, so that both do the same work. Seconds are medians of `repeats` runs.
"""

import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

BETAS = (0.05, 0.1, 0.2, 0.5)
BATCH = 8
SHAPES = {  # mean tokens of prompt, chosen, rejected; standard deviation of a length's logarithm; max_length; pairs
    "prompt-heavy": ((145, 46, 58), 0.58, 512, 160),
    "answer-heavy": ((57, 617, 514), 0.28, 1024, 64),
}
TEMPLATE = (3, 1, 1)  # tokens that the chat template adds to them
ARCHITECTURE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}


def make_model(folder):
    """A model of random weights with the embedded tokenizer, whose chat template it speaks."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from dpo_kit.toy import MODEL

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(0)
    config = Qwen2Config(**ARCHITECTURE, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_pairs(folder, shape, spread, pairs):
    """A folder with train.jsonl: chat messages of random words whose token counts have the means of `shape`."""
    from transformers import AutoTokenizer

    from dpo_kit.toy import MODEL

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    words = [
        text for text in map(tokenizer.decode, range(tokenizer.vocab_size)) if text[:1] == " " and text[1:].isalpha()
    ]
    draw = random.Random(0)

    def texts(mean, added):
        quantiles = (statistics.NormalDist().inv_cdf((place + 0.5) / pairs) for place in range(pairs))
        lengths = [round(mean * math.exp(spread * each - spread**2 / 2)) - added for each in quantiles]
        return ["".join(draw.choices(words, k=max(3, length))) for length in draw.sample(lengths, pairs)]

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w") as file:
        columns = map(texts, shape, TEMPLATE)
        for prompt, chosen, rejected in zip(*columns, strict=True):
            row = {
                "prompt": say("user", prompt),
                "chosen": say("assistant", chosen),
                "rejected": say("assistant", rejected),
            }
            file.write(json.dumps(row) + "\n")
    return folder


def say(role, text):
    return [{"role": role, "content": text}]
