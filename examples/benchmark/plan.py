"""The memory that a plan foresees: against what training takes, and for models of known sizes.

    python examples/benchmark/plan.py              # random weights, each run a process of its own; half an hour
    python examples/benchmark/plan.py table=true   # what 0.5B to 8B need, from their published shapes; some minutes

Estimates of the first are meant to lie within 20 % of the measured peak.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config

from dpo_kit import compose
from dpo_kit.cli.plan import find_devices, plan_on
from dpo_kit.config.compose import check
from dpo_kit.run.quiet import quiet_libraries
from dpo_kit.toy import MODEL

SIZES = {
    "29M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 4096},
    "98M": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "vocab_size": 8192},
}
CELLS = {
    "full": [],
    "full, reference beside": ["speed.reference_store=false"],
    "full, checkpointing": ["trl.gradient_checkpointing=true"],
    "full, no shared prefix": ["speed.share_prefix=false"],
    "full, accumulated": ["trl.gradient_accumulation_steps=2"],
    "full, fp32": ["trl.bf16=false"],
    "full, with the probe": ["callbacks=default", "callbacks.pairs=8", "callbacks.prompts=8"],
    "lora": ["model.tuning=lora"],
    "lora, checkpointing": ["model.tuning=lora", "trl.gradient_checkpointing=true"],
    "lora, no shared prefix": ["model.tuning=lora", "speed.share_prefix=false"],
    "lora, fp32": ["model.tuning=lora", "model.dtype=float32", "trl.bf16=false"],
    "orpo, full": ["method=orpo"],
    "kto, lora": ["method=kto", "model.tuning=lora"],
}
SHAPES = {  # hidden size, of the MLP, layers, heads, key-value heads, vocabulary, whether head and embedding are one
    "Qwen2.5-0.5B": (Qwen2Config, 896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": (Qwen2Config, 1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-7B": (Qwen2Config, 3584, 18944, 28, 28, 4, 152064, False),
    "Llama-3.1-8B": (LlamaConfig, 4096, 14336, 32, 32, 8, 128256, False),
}
ON_A_GPU = ["model.dtype=bfloat16", "trl.bf16=true", "trl.gradient_checkpointing=true"]
COMMON = ["model=local", "data=jsonl", "callbacks=none", "trl.max_length=512", "trl.per_device_train_batch_size=4"]
COMMON += ["allow_learning_rate=true", "speed.reference_store=true"]  # three steps see too few rows for auto


def main(wanted):
    """Print one row a cell; `wanted`: `sizes=29M` and `cells=2` take fewer."""
    if wanted.get("table") == "true":
        return show_sizes(wanted.get("sizes", ",".join(SHAPES)).split(","))
    sizes = wanted.get("sizes", ",".join(SIZES)).split(",")
    table = Table(title="peak memory of one process, MB")
    for name in ("model", "run", "planned", "measured", "planned / measured"):
        table.add_column(name, justify="left" if name in ("model", "run") else "right")
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder) / "pairs.jsonl")
        for size in sizes:
            write_model(Path(folder) / size, SIZES[size])
            for name, words in list(CELLS.items())[: int(wanted.get("cells", len(CELLS)))]:
                planned, measured = compare(Path(folder), size, words)
                row = (f"{planned / 1e6:.0f}", f"{measured / 1e6:.0f}", f"{planned / measured:.2f}")
                table.add_row(size, name, *row)
                print(size, name, *row, file=sys.stderr, flush=True)
    Console().print(table)


def show_sizes(sizes):
    """Peak and devices for models of `sizes`: two pairs a device, prompts of 256 and answers of 384 tokens."""
    quiet_libraries()
    table = Table(title="peak memory of one process, GB, and what it fits")
    for name in ("model", "parameters", "tuning", "peak", "fits"):
        table.add_column(name, justify="left" if name in ("model", "tuning", "fits") else "right")
    rows = [{"tokens": {"prompt": 256, "chosen": 384, "rejected": 384, "cut": False}}] * 64
    with tempfile.TemporaryDirectory() as folder:
        for name in sizes:
            write_shape(Path(folder) / name, *SHAPES[name])
            for tuning in ("full", "lora", "qlora"):
                words = [*ON_A_GPU, "model=local", f"model.path={folder}/{name}", f"model.tuning={tuning}"]
                words += ["model.dtype=float32"] if tuning == "full" else []  # bf16 rounds its updates away
                settings = check(
                    compose([*words, "data=toy", "trl.per_device_train_batch_size=2", "trl.max_length=1024"])
                )
                found = plan_on(settings, SimpleNamespace(train=rows))
                found = replace(found, peak=found.peak - found.memory["libraries"])  # in a CPU's memory alone
                fitting = find_devices(found, settings)
                fits = f"{fitting[0]} × {fitting[1]} GB" if fitting else "none of these"
                table.add_row(name, f"{found.parameters / 1e9:.2f}B", tuning, f"{found.peak / 1e9:.1f}", fits)
                print(name, tuning, f"{found.peak / 1e9:.1f}", fits, file=sys.stderr, flush=True)
    Console().print(table)


def write_shape(folder, config, hidden, inner, layers, heads, key_heads, vocabulary, tied):
    config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    ).save_pretrained(folder)


def write_model(folder, sizes):
    config = LlamaConfig(
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True, eos_token_id=4, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)


def write_pairs(file, count=64):
    """Prompts of some 160 tokens, answers of some 120."""
    words = sorted(AutoTokenizer.from_pretrained(MODEL).vocab)
    plain, rng = [word for word in words if word.isalpha()], random.Random(0)

    def text(least, most):
        return " ".join(rng.choices(plain, k=rng.randint(least, most)))

    rows = [{"prompt": text(50, 90), "chosen": text(40, 70), "rejected": text(40, 70)} for _ in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def compare(folder, size, words):
    """Planned and measured peak of one run, in bytes."""
    out = folder / "plan.json"
    given = [*COMMON, f"model.path={folder / size}", f"data.train={folder / 'pairs.jsonl'}", *words]
    once = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}  # what is freed is given back
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | once | {"DPO_KIT_CACHE": cache}
        command = [sys.executable, "-m", "dpo_kit", "plan", *given, "first_step=true", f"out={out}"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(out.read_text())
    return found["peak"], found["measured"]["peak"]


if __name__ == "__main__":
    main(dict(word.split("=", 1) for word in sys.argv[1:]))
