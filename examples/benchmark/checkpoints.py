"""What safe checkpoints cost: TRL's own saving against ours, in turns, medians over runs.

    python examples/benchmark/checkpoints.py [runs=5 steps=8 every=2 out=checkpoints.json]

For the embedded model and for a random one of 57M parameters (so that bytes dominate), full tuning and LoRA. `a save`
is the time for which training stands still, waiting for an earlier save included. `a run` is the whole of
`trainer.train()`, so that what the thread beside training takes away is counted. The extra of a run is also given as
a share of the time that stock saving takes: the promise is 10 % at most.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

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
    """Medians of seconds: of a save and of a run, stock and ours."""
    found = {"stock": [], "ours": []}
    for number in range(2 * (runs + 1)):
        kind = ("stock", "ours")[(number + number // 2) % 2]  # stock, ours, ours, stock, … so that drift cancels
        measured = one_run(path, tuning, kind, steps, every)
        if number >= 2:  # the first of each warms up
            found[kind].append(measured)
    median = {kind: [statistics.median(column) for column in zip(*each, strict=True)] for kind, each in found.items()}
    (stock_save, stock_run, size), (save, run, _) = median["stock"], median["ours"]
    return {
        "megabytes": size / 1e6,
        "stock_save_seconds": stock_save,
        "save_seconds": save,
        "stock_run_seconds": stock_run,
        "run_seconds": run,
        "save_percent": 100 * (save - stock_save) / stock_save,
        "run_percent_of_saving": 100 * (run - stock_run) / (stock_save * (steps // every)),
    }


def one_run(path, tuning, kind, steps, every):
    """(seconds in which a save holds training up, seconds of the run, bytes of a checkpoint)."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(path, tuning, kind, Path(folder), steps, every)
        held_up, honest = [], trainer._save_checkpoint

        def timed(*args):
            started = time.perf_counter()
            honest(*args)
            held_up.append(time.perf_counter() - started)

        trainer._save_checkpoint = timed
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        newest = max(Path(folder).glob("checkpoint-*"), key=lambda each: int(each.name.split("-")[1]))
        return (
            statistics.mean(held_up),
            seconds,
            sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()),
        )


def build(path, tuning, kind, folder, steps, every):
    """A DPO trainer on the embedded pairs that does nothing but train and save."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from dpo_kit.quiet import quiet_libraries
    from dpo_kit.recorder import show_progress
    from dpo_kit.safekeeping import with_safekeeping
    from dpo_kit.toy import MODEL, TRAIN

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
    trainer = (DPOTrainer if kind == "stock" else with_safekeeping(DPOTrainer))(
        model=AutoModelForCausalLM.from_pretrained(source),
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(source),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if tuning == "lora" else None,
    )
    show_progress(trainer)
    return trainer


def show(rows):
    table = Table(title=f"safe checkpoints against TRL's own; promised: at most {PROMISED:g} % of stock saving")
    heads = (
        "model",
        "tuning",
        "MB",
        "a save: stock s",
        "ours s",
        "more %",
        "a run: stock s",
        "ours s",
        "more, % of saving",
    )
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < 2 else "right")
    for row in rows:
        figures = [f"{row[key]:.3f}" for key in ("stock_save_seconds", "save_seconds")]
        run = [f"{row[key]:.2f}" for key in ("stock_run_seconds", "run_seconds")]
        shares = [f"{row[key]:.1f}" for key in ("save_percent", "run_percent_of_saving")]
        table.add_row(row["model"], row["tuning"], f"{row['megabytes']:.1f}", *figures, shares[0], *run, shares[1])
    Console(width=130).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
