"""Training time of dpo_kit beside stock `trl dpo`, on the same pairs, taken in turns; what `make bench` prints.

    python examples/benchmark/speed.py [part=single,lora,levers,limit,scaling] [repeats=3] [pairs=N] [out=FILE]
                                       [shape=prompt-heavy|answer-heavy] [size=5m|0.5b|1.5b|7b] [longer=1]
                                       [group.key=value ...: for dpo_kit's side only]

The model has random weights (Qwen2, 5.5M parameters: what it says plays no part), the pairs are random words of two
shapes: prompt-heavy (145 tokens of prompt, 46 and 58 of answers) and answer-heavy (57, 617, 514), with log-normal
lengths. Nobody evaluates or saves checkpoints, so that both do the same work. Values are medians of `repeats` runs,
taken in turns; a stock sweep is four runs of `trl dpo`, one after the other.

Both sides use a GPU where PyTorch finds one; the memory is then not compared, as it is the process's. For one,
`size=0.5b longer=2 pairs=1000` takes Qwen2's architecture of that size and sequences of up to 2,048 tokens.
"""

import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

WORK = Path(tempfile.mkdtemp())
BETAS = (0.05, 0.1, 0.2, 0.5)
BATCH = 8
RATE = "1e-5"
SHAPES = {  # mean tokens of prompt, chosen, rejected; standard deviation of a length's logarithm; max_length; pairs
    "prompt-heavy": ((145, 46, 58), 0.58, 512, 160),
    "answer-heavy": ((57, 617, 514), 0.28, 1024, 64),
}
TEMPLATE = (3, 1, 1)  # tokens that the chat template adds to them
SIZES = {
    "5m": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}
OPTIONS = {"part", "repeats", "pairs", "out", "shape", "size", "longer", "who"}
GIVEN = []  # options of dpo_kit on the command line


def make_model(folder, size):
    """A model of random weights with the embedded tokenizer, whose chat template it speaks."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from dpo_kit.toy import MODEL

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen2Config(**{"tie_word_embeddings": True} | SIZES[size] | special)
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


# --- one process -------------------------------------------------------------------------------------------------


def run(*words):
    """Wall seconds, peak memory (MiB) and output of a command, which must succeed."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, cwd=WORK)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read()
    if status:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{text[-2000:]}")
    wall = time.perf_counter() - started
    print(f"{wall:6.1f} s:", *" ".join(map(str, words[1:])).split(), file=sys.stderr)
    return {"wall": wall, "memory": usage.ru_maxrss / 1024, "text": text}


def stock_words(shape, beta=0.1, lora=False, equal=False):
    """`trl dpo` as it comes; `equal`: without activation checkpointing, as ours; bf16 is its default too."""
    words = ["--model_name_or_path", "model", "--dataset_name", shape, "--output_dir", tempfile.mkdtemp(dir=WORK)]
    words += ["--beta", beta, "--max_length", SHAPES[shape][2], "--per_device_train_batch_size", BATCH]
    words += ["--num_train_epochs", "1", "--learning_rate", RATE, "--save_strategy", "no", "--report_to", "none"]
    words += [] if torch.cuda.is_available() else ["--use_cpu"]
    words += ["--use_peft", "--lora_r", "16", "--lora_alpha", "32"] if lora else []
    words += ["--gradient_checkpointing", "false"] if equal else []
    return [sys.executable, "-c", "from trl.cli import main; main()", "dpo", *map(str, words)]


def stock(shape, beta=0.1, lora=False, equal=False):
    found = run(*stock_words(shape, beta, lora, equal))
    found["train"] = float(re.search(r"'train_runtime': '?([\d.]+)", found["text"])[1])
    return found


def overrides(shape, *more, lora=False):
    words = f"""
        model=local model.path=model model.tuning={"lora" if lora else "full"}
        data=jsonl data.train={shape}/train.jsonl data.eval=eval/train.jsonl
        tracking=none callbacks=none trl.eval_strategy=no trl.save_strategy=no
        trl.per_device_train_batch_size={BATCH} trl.max_length={SHAPES[shape][2]} trl.learning_rate={RATE}
    """
    return [*words.split(), *GIVEN, *more]


def our_words(shape, *more, lora=False, beta=0.1, changed=""):
    """dpo_kit on the same rows, with a cache of its own; `changed` is Python that changes a constant of it first."""
    os.environ["DPO_KIT_CACHE"] = tempfile.mkdtemp(dir=WORK)
    folder = tempfile.mkdtemp(dir=WORK)
    start = ("-c", f"{changed}\nfrom dpo_kit.cli.main import main\nmain()") if changed else ("-m", "dpo_kit")
    words = [*overrides(shape, *more, lora=lora), f"beta={beta}", f"hydra.run.dir={folder}/run"]
    return [sys.executable, *start, *words]


def ours(shape, *more, lora=False, beta=0.1, changed=""):
    """A run whose reference pass (of which nothing is kept from before) is counted as training."""
    words = our_words(shape, *more, lora=lora, beta=beta, changed=changed)
    found = run(*words)
    passes = sum(map(float, re.findall(r"sequences computed in ([\d.]+) s", found["text"])))
    result = Path(words[-1].removeprefix("hydra.run.dir="), "result.json")
    found["train"] = json.loads(result.read_text())["seconds"]["train"] + passes
    return found


def our_sweep(shape, lora=False):
    os.environ["DPO_KIT_CACHE"] = tempfile.mkdtemp(dir=WORK)
    sweep = f"beta={','.join(map(str, BETAS))}"
    folder = tempfile.mkdtemp(dir=WORK)
    return run(
        sys.executable, "-m", "dpo_kit", "-m", *overrides(shape, lora=lora), sweep, f"hydra.sweep.dir={folder}/sweep"
    )


def median(runs, what):
    return statistics.median(each[what] for each in runs)


# --- the tables --------------------------------------------------------------------------------------------------


def compare(shape, repeats, lora):
    """Single runs in turns and sweeps: the rows of one shape."""
    kinds = {"stock": [], "equal": [], "ours": []}
    for turn in range(max(repeats, len(BETAS))):
        kinds["stock"].append(stock(shape, BETAS[turn % len(BETAS)], lora))
        if turn < repeats:
            kinds["equal"].append(stock(shape, lora=lora, equal=True))
            kinds["ours"].append(ours(shape, lora=lora))
    sweeps = [our_sweep(shape, lora) for _ in range(repeats)]
    four = sum(each["wall"] for each in kinds["stock"][: len(BETAS)])
    name = f"{shape}, {'LoRA' if lora else 'full'}"
    memory = [median(kinds[who], "memory") for who in ("equal", "ours")]
    compared = [] if torch.cuda.is_available() else [row(f"{name}: peak memory, equal settings", *memory, "MiB")]
    return [
        row(f"{name}: training", median(kinds["stock"], "train"), median(kinds["ours"], "train"), "s"),
        row(f"{name}: against equal settings", median(kinds["equal"], "train"), median(kinds["ours"], "train"), "s"),
        row(f"{name}: sweep of {len(BETAS)} betas, imports in", four, median(sweeps, "wall"), "s"),
        *compared,
    ]


def row(name, theirs, own, unit):
    return {"name": name, "stock": theirs, "dpo_kit": own, "unit": unit, "ratio": theirs / own}


LEVERS = {
    "all of them": [],
    "a prompt twice, and padding": ["speed.share_prefix=false"],
    "padding, but in batches of similar length": ["speed.share_prefix=false", "speed.group_by_length=true"],
    "no reference pass: the reference in every step": ["speed.reference_store=false"],
    "fp32": ["trl.bf16=false"],
    "activation checkpointing, as stock has it": ["trl.gradient_checkpointing=true"],
    "tried: batches of similar length besides": ["speed.group_by_length=true"],
    "tried: two processes that load data": ["trl.dataloader_num_workers=2"],
}
CHANGED = {  # by a constant, not by an option
    "tried: PyTorch's fused attention": "import dpo_kit.trainer.prefix; dpo_kit.trainer.prefix.LONGEST = 0",
    "tried: TRL's own tiles of the LM head": "import dpo_kit.trainer.speed; dpo_kit.trainer.speed.HEAD_TOKENS = 4096",
}


def levers(shape, repeats):
    """Training seconds with one lever taken away at a time, or with what was tried and left out; each turn in an order
    of its own, as a run is slower after some than after others.
    """
    runs = {name: [] for name in LEVERS | CHANGED}
    draw = random.Random(0)
    for _ in range(repeats):
        for name in draw.sample([*runs], len(runs)):
            runs[name].append(ours(shape, *LEVERS.get(name, ()), changed=CHANGED.get(name, "")))
    best = median(runs["all of them"], "train")
    return [row(f"{shape}: {name}", median(found, "train"), best, "s") for name, found in runs.items()]


def limit(shape, repeats):
    """Seconds of a step: a bare loop on the same packed tokens, and the trainer, in turns, each in a new process."""
    runs = {"bare": [], "trainer": []}
    for _ in range(repeats):
        for who, found in runs.items():
            os.environ["DPO_KIT_CACHE"] = tempfile.mkdtemp(dir=WORK)
            text = run(
                sys.executable, Path(__file__).resolve(), *sys.argv[1:], "part=steps", f"shape={shape}", f"who={who}"
            )["text"]
            found.append(float(text.splitlines()[-1]))
    bare, trainer = map(statistics.median, runs.values())
    return [row(f"{shape}: a step on the same packed tokens", bare, trainer, "s")]


def steps(shape, who):
    """Print the seconds of a step in TRL's trainer as dpo_kit sets it up, or in the least loop that does the same."""
    from torch.nn.functional import cross_entropy, logsigmoid

    from dpo_kit import compose, train, training

    found = []

    def in_trainer(trainer, *told):
        started = time.perf_counter()
        trainer.train()
        found.append((time.perf_counter() - started) / trainer.state.global_step)
        return 0.0

    def in_bare_loop(trainer, *told):
        batches = list(trainer.get_train_dataloader())
        model = trainer.accelerator.unwrap_model(trainer.model).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=float(RATE), fused=True)
        started = time.perf_counter()
        for batch in batches:
            ids, labelled = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=trainer.args.bf16):
                hidden = model.base_model(ids, batch["attention_mask"], use_cache=False).last_hidden_state
                logits = model.get_output_embeddings()(hidden[:, :-1][labelled]).float()
            terms = -cross_entropy(logits, ids[:, 1:][labelled], reduction="none")
            sums = terms.new_zeros(len(ids)).index_add(0, labelled.nonzero()[:, 0], terms)
            chosen, rejected = sums.chunk(2)
            margin = chosen - batch["ref_chosen_logps"] - rejected + batch["ref_rejected_logps"]
            (-logsigmoid(0.1 * margin).mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        float(margin.sum())  # waits for a GPU
        found.append((time.perf_counter() - started) / len(batches))
        return 0.0

    training.run_trainer = {"trainer": in_trainer, "bare": in_bare_loop}[who]
    train(compose(overrides(shape, "speed.reference_store=true")), Path(tempfile.mkdtemp()) / "run")
    print(found[0])


SCALES = {
    "pairs": (250, 500, 1000, 2000),
    "length": (128, 256, 512, 1024),
    "batch": (1, 2, 4, 8, 16),
}


def scaling():
    """Training seconds over the number of pairs, their length and the batch size, each with its fitted growth."""
    usual = {"pairs": 250, "length": 128, "batch": BATCH}
    rows = []
    for axis, values in SCALES.items():
        seconds = []
        for value in values:
            given = usual | ({"pairs": 64} if axis != "pairs" else {}) | {axis: value}
            shape = f"scaling-{given['pairs']}-{given['length']}"
            means = tuple(given["length"] * part for part in (0.4, 0.3, 0.3))
            SHAPES[shape] = (means, 0.3, 2 * given["length"], given["pairs"])
            make_pairs(WORK / shape, *SHAPES[shape][:2], given["pairs"])
            seconds.append(ours(shape, f"trl.per_device_train_batch_size={given['batch']}")["train"])
        growth = statistics.linear_regression([*map(math.log, values)], [*map(math.log, seconds)]).slope
        rows.append({"name": axis, "values": values, "seconds": seconds, "growth": growth})
    return rows


def show(title, rows, other="stock"):
    table = Table("", other, "dpo_kit", "ratio", title=title, title_justify="left", box=MARKDOWN)
    for each in rows:
        values = (f"{each[who]:,.4g} {each['unit']}" for who in ("stock", "dpo_kit"))
        table.add_row(each["name"], *values, f"{each['ratio']:.2f}")
    Console(width=120).print(table)


def show_scaling(rows):
    columns = ("", "seconds of training", "seconds grow as")
    table = Table(*columns, title="dpo_kit alone", title_justify="left", box=MARKDOWN)
    for each in rows:
        pairs = ", ".join(f"{v}: {s:.3g}" for v, s in zip(each["values"], each["seconds"], strict=True))
        table.add_row(each["name"], pairs, f"{each['name']}^{each['growth']:.2f}")
    Console(width=120).print(table)


PARTS = {
    "single": lambda shape, repeats: compare(shape, repeats, lora=False),
    "lora": lambda shape, repeats: compare(shape, repeats, lora=True),
    "levers": levers,
    "limit": limit,
}


def set_shapes(pairs, longer):
    for shape, (means, spread, longest, usual) in SHAPES.items():
        SHAPES[shape] = (tuple(longer * mean for mean in means), spread, longer * longest, int(pairs or usual))


def main(arguments):
    options = dict(argument.split("=", 1) for argument in arguments)
    GIVEN.extend(f"{key}={options[key]}" for key in options if "." in key)
    if unknown := {key for key in options if "." not in key} - OPTIONS:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(sorted(OPTIONS - {'who'}))}")
    set_shapes(options.get("pairs"), int(options.get("longer", 1)))
    if options.get("part") == "steps":
        return steps(options["shape"], options["who"])
    make_model(WORK / "model", options.get("size", "5m"))
    for shape, (means, spread, _, pairs) in SHAPES.items():
        make_pairs(WORK / shape, means, spread, pairs)
    make_pairs(WORK / "eval", (20, 10, 10), 0.1, 8)
    results, shapes = {}, options.get("shape", ",".join(SHAPES)).split(",")
    for part in options.get("part", ",".join([*PARTS, "scaling"])).split(","):
        if part == "scaling":
            results[part] = scaling()
            show_scaling(results[part])
        else:
            results[part] = [each for shape in shapes for each in PARTS[part](shape, int(options.get("repeats", 3)))]
            show(part, results[part], {"limit": "bare loop", "levers": "without it"}.get(part, "stock"))
        if "out" in options:
            Path(options["out"]).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
