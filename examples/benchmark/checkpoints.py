"""What safe checkpoints cost: TRL's own saving against ours, in turns, medians.

    python examples/benchmark/checkpoints.py [runs=5 steps=8 every=2 out=checkpoints.json]

For the embedded model and for a random one of 57M parameters (so that bytes dominate), full tuning and LoRA. `held up`
is the time for which training stands still at a save, waiting for an earlier one included; the promise is at most 10 %
more than with TRL. `complete after` is when the checkpoint counts: what the thread beside training takes. `a run` is
all of `trainer.train()`, in which that thread competes with training where no core is idle.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpo_kit.trainer.resume import whole_or_absent

PROMISED = 10.0  # per cent


def main(arguments):
    options = {"runs": "5", "steps": "8", "every": "2"} | dict(argument.split("=", 1) for argument in arguments)
    runs, steps, every = (int(options[key]) for key in ("runs", "steps", "every"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model, path in (("embedded", None), ("57M", build_large(Path(folder) / "large"))):
            for tuning in ("full", "lora"):
                rows.append({"model": model, "tuning": tuning, **compare(path, tuning, runs, steps, every)})
    show(rows)
    if "out" in options:
        Path(options["out"]).write_text(json.dumps(rows, indent=2) + "\n")


def build_large(folder):
    """A random Llama of 57M parameters with the embedded tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from dpo_kit.toy import MODEL

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compare(path, tuning, runs, steps, every):
    """Medians of seconds, stock and ours: over all saves, and over the runs."""
    held_up, whole, completing = {"stock": [], "ours": []}, {"stock": [], "ours": []}, []
    for number in range(2 * (runs + 1)):
        kind = ("stock", "ours")[(number + number // 2) % 2]  # stock, ours, ours, stock, … so that drift cancels
        run = one_run(path, tuning, kind, steps, every)
        if number >= 2:  # the first of each warms up
            held_up[kind] += run["held_up"]
            whole[kind].append(run["seconds"])
            completing += run["completing"]
    stock, ours = (statistics.median(held_up[kind]) for kind in ("stock", "ours"))
    return {
        "megabytes": run["bytes"] / 1e6,
        "stock_held_up_seconds": stock,
        "held_up_seconds": ours,
        "more_percent": 100 * (ours - stock) / stock,
        "complete_after_seconds": statistics.median(completing),
        "stock_run_seconds": statistics.median(whole["stock"]),
        "run_seconds": statistics.median(whole["ours"]),
    }


def one_run(path, tuning, kind, steps, every):
    """Seconds of each save that holds training up, of each completing beside it, of the run; bytes of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder, timed(whole_or_absent, "complete") as completing:
        trainer = build(path, tuning, kind, Path(folder), steps, every)
        with timed(trainer, "_save_checkpoint") as held_up:
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
        newest = max(Path(folder).glob("checkpoint-*"), key=lambda each: int(each.name.split("-")[1]))
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
        return {"held_up": held_up, "completing": completing, "seconds": seconds, "bytes": size}


@contextlib.contextmanager
def timed(owner, name):
    """The seconds of each call of `owner.name` inside the block, as a list that grows."""
    seconds, honest = [], getattr(owner, name)

    def measured(*args):
        started = time.perf_counter()
        honest(*args)
        seconds.append(time.perf_counter() - started)

    setattr(owner, name, measured)
    yield seconds
    setattr(owner, name, honest)


def build(path, tuning, kind, folder, steps, every):
    """A DPO trainer on the embedded pairs that does nothing but train and save."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from dpo_kit.run.quiet import quiet_libraries
    from dpo_kit.toy import MODEL, TRAIN
    from dpo_kit.trainer.build import with_mixins
    from dpo_kit.trainer.recorder import show_progress
    from dpo_kit.trainer.resume.safe_trainer import Safekeeping

    quiet_libraries()
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()[:64]]
    data = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    args = DPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=every,
        save_total_limit=2,
        per_device_train_batch_size=1,
        max_length=48,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    source = str(path or MODEL)
    trainer = (DPOTrainer if kind == "stock" else with_mixins(DPOTrainer, Safekeeping))(
        model=AutoModelForCausalLM.from_pretrained(source),
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(source),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if tuning == "lora" else None,
    )
    show_progress(trainer)
    return trainer


def show(rows):
    table = Table(title=f"safe checkpoints beside TRL's own; promised: at most {PROMISED:g} % more held up")
    heads = (
        "model",
        "tuning",
        "MB",
        "held up: TRL s",
        "ours s",
        "more %",
        "complete after s",
        "a run: TRL s",
        "ours s",
    )
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < 2 else "right")
    for row in rows:
        held_up = [f"{row[key]:.3f}" for key in ("stock_held_up_seconds", "held_up_seconds")]
        rest = [f"{row[key]:.2f}" for key in ("complete_after_seconds", "stock_run_seconds", "run_seconds")]
        size, more = f"{row['megabytes']:.1f}", f"{row['more_percent']:+.1f}"
        table.add_row(row["model"], row["tuning"], size, *held_up, more, *rest)
    Console(width=130).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
