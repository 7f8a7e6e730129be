"""What one process of `gpu.py` does: it measures the rows that it is told, one after the other, a line of each.

    python gpu_parts.py '{"rows": […], "work": FOLDER, "device": "cuda", "born": …, "until": …}'

A line is `ROW ` and JSON; all else that is printed belongs to the libraries. `born` and `until` are seconds since 1970:
a row that would take longer than until then is left out, and says so.
"""

import contextlib
import copy
import gc
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))
LONGEST = 2048
RATE = "1e-5"
SMALL = (
    "tracking=none trl.max_steps=8 trl.eval_steps=4 callbacks.pairs=16 callbacks.prompts=8 callbacks.max_new_tokens=16"
)
SMALL += " trl.per_device_train_batch_size=8 callbacks.preview=[]"


def main(told):
    """Measure `told["rows"]`; `found` gathers what later rows of this process need of earlier ones."""
    prepare(told)
    for row in told["rows"]:
        if time.time() + row["needs"] > told["until"]:
            say(row, outcome="not tried", why="time")
            continue
        say(row, outcome="started")
        started = time.time()
        try:
            values = MEASURES[row["what"]](row, told)
        except (Exception, SystemExit) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            say(row, outcome="failed", why=f"{type(error).__name__}: {why[-300:]}", wall=time.time() - started)
        else:
            say(row, outcome="ran", wall=time.time() - started, **values)
        clean()


def say(row, **values):
    sys.__stdout__.write(f"ROW {json.dumps({'key': row['key'], **values})}\n")
    sys.__stdout__.flush()


def prepare(told):
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    os.environ["DPO_KIT_CACHE"] = tempfile.mkdtemp(dir=told["work"])  # what was computed before plays no part
    if told["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def clean():
    """What a row has left on the card is given back, so that the peak of the next one is its own."""
    if "torch" not in sys.modules:
        return
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait():
    """Until the device has done what it was asked for."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak():
    """Bytes that tensors took at the most, since the last row; None on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


# --- the card, and what starting costs -----------------------------------------------------------------------------


def imports(row, told):
    """Seconds from the start of the process until TRL's trainer, or dpo_kit's, could be built."""
    import trl
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    trl.DPOTrainer  # noqa: B018  what TRL imports when it is first asked for
    if row["who"] == "dpo_kit":
        import dpo_kit.cli.main
        import dpo_kit.training  # noqa: F401
    return {"seconds": time.time() - told["born"]}


def product(row, told):
    """What the card multiplies in bf16, in operations a second, and what it is called."""
    import torch

    on_gpu = told["device"] == "cuda"
    size, times = (8192, 30) if on_gpu else (1024, 3)
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=told["device"]) for _ in range(2))
    seconds = []
    for _ in range(4):
        wait()
        started = time.perf_counter()
        for _ in range(times):
            left @ right
        wait()
        seconds.append((time.perf_counter() - started) / times)
    card = torch.cuda.get_device_name() if on_gpu else "cpu"
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else None
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    return {"card": card, "memory": memory, "size": size, "rate": 2 * size**3 / min(seconds[1:]), **versions}


# --- training ------------------------------------------------------------------------------------------------------


def model_folder(told, size):
    """A folder with config and tokenizer; weights are drawn where they are used (`random_weights`)."""
    from speed import SIZES
    from transformers import AutoTokenizer, Qwen2Config

    from dpo_kit.toy import MODEL

    folder = Path(told["work"]) / size
    if not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        sizes = {"tie_word_embeddings": True} | SIZES[size] | special
        Qwen2Config(**sizes, architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def random_weights(device):
    """Whoever loads a Qwen2 gets random weights, made on `device` and the same each time: reading them from a disk
    would take longer than what is measured.
    """
    import torch
    from transformers import AutoConfig, Qwen2ForCausalLM

    def made(path, *_, dtype=torch.float32, attn_implementation=None, **ignored):
        config = AutoConfig.from_pretrained(path)
        torch.manual_seed(0)
        with torch.device(device):
            return Qwen2ForCausalLM._from_config(
                config, dtype=dtype, attn_implementation=attn_implementation or "sdpa"
            ).eval()

    return patch.object(Qwen2ForCausalLM, "from_pretrained", made)


def pairs_folder(told, row):
    """The pairs of a row, as many as its steps take."""
    from speed import SHAPES, make_pairs

    means, spread, *_ = SHAPES[row["shape"]]
    count = row["rows"] * row["accumulate"] * (row["steps"] + row["warm"])
    folder = Path(told["work"]) / f"{row['shape']}-{row['longer']}-{count}"
    return make_pairs(folder, [row["longer"] * mean for mean in means], spread, count)


def measure_stock(row, told):
    """Steps of TRL's trainer as `trl dpo` builds it, with the defaults of its command line."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config

    started = time.perf_counter()
    asked = ModelConfig(use_peft=row["tuning"] == "lora", lora_r=16, lora_alpha=32)
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(dir=told["work"]),
        max_length=LONGEST,
        per_device_train_batch_size=row["rows"],
        gradient_accumulation_steps=row["accumulate"],
        max_steps=row["steps"] + row["warm"],
        learning_rate=float(RATE),
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=told["device"] == "cpu",
        model_init_kwargs={"dtype": asked.dtype, "attn_implementation": asked.attn_implementation},
        **({} if row["arm"] == "stock" else {"gradient_checkpointing": False}),
    )
    rows = load_dataset("json", data_files=str(pairs_folder(told, row) / "train.jsonl"), split="train")
    with random_weights(told["device"]):
        folder = str(model_folder(told, row["size"]))
        trainer = DPOTrainer(model=folder, args=args, train_dataset=rows, peft_config=get_peft_config(asked))
        start = time.perf_counter() - started
        return timed_steps(trainer, row) | {"start": start}


def measure_ours(row, told):
    """Steps of the trainer that dpo_kit builds, with its defaults, and its reference pass over the same pairs."""
    from dpo_kit.trainer import memory

    count, planned = memory.estimate, []

    def estimate(model, settings, args, *more, **options):
        needed = count(model, settings, args, *more, **options)
        planned.append(needed.peak(args.gradient_accumulation_steps > 1))
        return needed

    with random_weights(told["device"]), patched((memory, "estimate", estimate)):
        found = run_ours(our_words(row, told), told, row)
    known = planned and not found["checkpointing"]  # what was counted was without
    return found | {"planned": planned[0] if known else None}


def our_words(row, told, evaluates=False):
    words = f"""
        model=local model.path={model_folder(told, row["size"])} model.tuning={row["tuning"]} tracking=none
        data=jsonl data.train={pairs_folder(told, row)}/train.jsonl data.eval={held_out(told, row)}/train.jsonl
        trl.per_device_train_batch_size={row["rows"]} trl.gradient_accumulation_steps={row["accumulate"]}
        trl.max_steps={row["steps"] + row["warm"]} trl.max_length={LONGEST} trl.learning_rate={RATE}
        trl.train_sampling_strategy=sequential trl.save_strategy=no trl.save_total_limit=1
    """
    words += "" if evaluates else " callbacks=none trl.eval_strategy=no"
    words += " trl.use_cpu=true" if told["device"] == "cpu" else ""
    return words.split()


def held_out(told, row):
    from speed import SHAPES, make_pairs

    means, spread, *_ = SHAPES[row["shape"]]
    count = row.get("held_out", 8)
    return make_pairs(Path(told["work"]) / f"held-out-{count}", [row["longer"] * mean for mean in means], spread, count)


def run_ours(words, told, row):
    """Values of `timed_steps`, the reference pass and the seconds before the first step; the run is not ended."""
    from dpo_kit import compose, train, training
    from dpo_kit.trainer import reference_store as reference

    passes, keys, found = [], [], {}
    pass_over, key_of = reference.reference_logps, reference.reference_key

    def timed_pass(trainer, sequences, root, name):
        if not passes:  # kernels are chosen on a few
            few = sequences[:: max(1, len(sequences) // 16)]
            pass_over(trainer, few, Path(tempfile.mkdtemp(dir=told["work"])), name)
        wait()
        since = time.perf_counter()
        values = pass_over(trainer, sequences, root, name)
        wait()
        passes.append((time.perf_counter() - since, len(sequences) // 2, distinct_tokens(sequences)))
        return values

    def timed_key(*given):
        if not keys:
            since = time.perf_counter()
            key = key_of(*given)
            keys.append((time.perf_counter() - since, key))
        return keys[0][1]

    def run_trainer(trainer, *rest):
        start = time.perf_counter() - started - sum(seconds for seconds, *_ in passes)
        found.update(timed_steps(trainer, row) | {"start": start})
        raise Measured

    started = time.perf_counter()
    changes = [(reference, "reference_logps", timed_pass), (reference, "reference_key", timed_key)]
    with patched(*changes, (training, "run_trainer", run_trainer)), contextlib.suppress(Measured):
        train(compose(words), Path(tempfile.mkdtemp(dir=told["work"])) / "run")
    names = ("reference", "reference_pairs", "reference_tokens")
    return found | dict(zip(names, map(sum, zip(*passes, strict=True)), strict=False))


class Measured(Exception):  # noqa: N818  it ends a run, and is no error
    """What was to be measured is known, and the run need not go on to its end."""


def patched(*changes):
    stack = contextlib.ExitStack()
    for owner, name, value in changes:
        stack.enter_context(patch.object(owner, name, value))
    return stack


def timed_steps(trainer, row):
    """Train; the seconds of all steps after the first `warm`, and what was in them."""
    from transformers import TrainerCallback

    marks, batches = {}, []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            if state.global_step in (row["warm"], state.max_steps):
                wait()
                marks[state.global_step] = time.perf_counter()

    collate = trainer.data_collator

    def counting(rows):
        batch = collate(rows)
        batches.append(count_tokens(batch))
        return batch

    trainer.data_collator = counting
    trainer.add_callback(Clock())
    checkpointing = trainer.args.gradient_checkpointing
    trainer.train()
    timed = batches[row["accumulate"] * row["warm"] :]
    distinct, keys, scored, slots = (sum(each) for each in zip(*timed, strict=True))
    seconds = marks[row["warm"] + row["steps"]] - marks[row["warm"]]
    counts = {"steps": row["steps"], "pairs": row["rows"] * len(timed), "distinct": distinct, "slots": slots}
    work = useful_operations(trainer.model, row["tuning"] != "full", distinct, keys, scored)
    return {"seconds": seconds, **counts, "operations": work, "peak": peak(), "checkpointing": checkpointing}


def count_tokens(batch):
    """Of a batch: distinct tokens, keys that they see, scored tokens, slots with padding."""
    import torch

    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    half = len(ids) // 2
    same = (ids[:half] == ids[half:]) & real[:half] & real[half:]
    shared = torch.cat((torch.zeros(half, dtype=torch.long), same.long().cumprod(1).sum(1)))
    whole = real.sum(1)
    keys = (whole * (whole + 1) - shared * (shared + 1)) // 2
    scored = batch["completion_mask"][:, 1:].sum()
    return [int(each) for each in ((whole - shared).sum(), keys.sum(), scored, ids.numel())]


def distinct_tokens(sequences):
    """Of (prompt, answer) of all chosen, then of all rejected: a pair's prompt counts once."""
    half = len(sequences) // 2
    return sum(len(prompt) * (row < half) + len(answer) for row, (prompt, answer) in enumerate(sequences))


def useful_operations(model, frozen, distinct, keys, scored):
    """Of a forward and a backward pass over each distinct token once: 6 a weight and token, 4 where weights are frozen
    (LoRA: no product for their gradient), 12 a key that a query sees and unit of width; the head on scored tokens.
    """
    config = model.config.get_text_config()
    outside = ("embed_tokens", "lm_head", "lora_")
    weights = sum(w.numel() for name, w in model.named_parameters() if not any(part in name for part in outside))
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    factor = 4 if frozen else 6
    head = config.hidden_size * config.vocab_size
    return factor * (weights * distinct + head * scored) + 12 * config.num_hidden_layers * width * keys


# --- the probe -----------------------------------------------------------------------------------------------------


def measure_probe(row, told):
    """Seconds of each measurement that dpo_kit's default callbacks make, of TRL's own evaluations, and of a step."""
    from transformers import Trainer

    from dpo_kit.callbacks import callbacks

    spent, half_way = [], []
    report, evaluate = callbacks._Measuring._report, Trainer.evaluate

    def timed_report(self, moment, step, *more, **options):
        before = getattr(self, "_moments_done", None)
        values = timed(moment, step, report, self, moment, step, *more, **options)
        half_way.extend([step] if getattr(self, "_moments_done", None) != before else [])
        return values

    def timed_evaluate(self, *given, **options):
        return timed("TRL", self.state.global_step, evaluate, self, *given, **options)

    def timed(moment, step, function, *given, **options):
        wait()
        since, before = time.perf_counter(), sum(seconds for *_, seconds in spent)
        try:
            return function(*given, **options)
        finally:
            wait()
            inside = sum(seconds for *_, seconds in spent) - before
            spent.append((moment, step, time.perf_counter() - since - inside))

    words = [*our_words(row, told, evaluates=True), f"trl.eval_steps={row['every']}"]
    changes = [(callbacks._Measuring, "_report", timed_report), (Trainer, "evaluate", timed_evaluate)]
    with random_weights(told["device"]), patched(*changes):
        found = run_ours(words, told, row)
    last = row["steps"] + row["warm"]
    inside = sum(
        seconds for moment, step, seconds in spent if moment in ("evaluation", "TRL") and row["warm"] <= step < last
    )
    step = (found["seconds"] - inside) / row["steps"]
    kept = ("reference", "reference_pairs", "peak")
    return {"spent": spent, "half_way": half_way, "step": step, **{name: found[name] for name in kept}}


# --- exactness -----------------------------------------------------------------------------------------------------


def measure_exactness(row, told):
    """How far hidden states, loss and gradients are apart: shared prefixes and padded rows, in bf16 and in fp32."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from dpo_kit.trainer.prefix import share_prefixes, why_not

    sizes = row["config"] | ({"use_sliding_window": True, "max_window_layers": 1} if row["window"] else {})
    config = Qwen2Config(**sizes, sliding_window=row["window"] or 4096, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device(told["device"]):
        padded = Qwen2ForCausalLM(config)
        for weight in padded.parameters():
            weight.data.mul_(2)  # so that attention is not flat
    shared = copy.deepcopy(padded)
    reason = why_not(shared)
    if reason:
        return {"shares": False, "why_not": reason}
    share_prefixes(shared)
    ids, mask, labelled = random_pairs(row, told["device"], config.vocab_size)
    outcomes = {
        (name, half): pass_both_ways(model, ids, mask, labelled, half, told["device"])
        for name, model in (("padded", padded), ("shared", shared))
        for half in (False, True)
    }
    true = outcomes["padded", False]
    apart = {
        "shared fp32": distances(outcomes["shared", False], true),
        "padded bf16": distances(outcomes["padded", True], true),
        "shared bf16": distances(outcomes["shared", True], true),
        "shared from padded, both bf16": distances(outcomes["shared", True], outcomes["padded", True]),
    }
    return {"shares": True, "apart": apart, "layers": list(getattr(config, "layer_types", []))}


def measure_sampling(row, told):
    """Tokens a second that are drawn after 128 tokens of prompt, in the batches of a CPU and in ours, with the caches
    of transformers that compile nothing.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from dpo_kit.model.sampling import DRAWN_AT_ONCE, rows_at_once

    with random_weights(told["device"]):
        dtype = torch.bfloat16 if told["device"] == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(model_folder(told, row["size"]), dtype=dtype)
    prompt, new, rates = 128, row["tokens"], {}
    for rows in sorted({DRAWN_AT_ONCE, min(row["rows"], rows_at_once(model, prompt + new))}):
        ids = torch.randint(9, 4000, (rows, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
        for cache in ("dynamic", "static"):
            options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": True, "pad_token_id": 0}
            config = GenerationConfig(**options, cache_implementation=cache, disable_compile=True)
            asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generation_config": config}
            model.generate(**asked | {"input_ids": ids[:1], "attention_mask": asked["attention_mask"][:1]})
            wait()
            started = time.perf_counter()
            model.generate(**asked)
            wait()
            rates[f"{rows} rows, {cache} cache"] = rows * new / (time.perf_counter() - started)
    return {"detail": "; ".join(f"{name}: {rate:,.0f} tokens/s" for name, rate in rates.items())}


def random_pairs(row, device, vocabulary):
    """Rows (2 n, L) of random tokens, chosen first, with padding on the right, their mask, and which are answers'."""
    import torch

    draw = torch.Generator().manual_seed(1)
    count, longest = row["pairs"], row["longest"]
    prompts = torch.randint(longest // 4, longest // 2, (count,), generator=draw).repeat(2)
    whole = prompts + torch.randint(1, longest // 2, (2 * count,), generator=draw)
    ids = torch.randint(vocabulary, (2 * count, int(whole.max())), generator=draw)
    places = torch.arange(ids.shape[1])
    ids[count:] = torch.where(places < prompts[:count, None], ids[:count], ids[count:])
    mask = places < whole[:, None]
    labelled = mask & (places >= prompts[:, None])
    return ids.to(device), mask.long().to(device), labelled.to(device)


def pass_both_ways(model, ids, mask, labelled, half, device):
    """Hidden states of real tokens, DPO's loss against a reference that knows nothing, and all gradients."""
    import torch
    from torch.nn.functional import cross_entropy, logsigmoid

    model.zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=half):
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        answers = labelled[:, 1:]
        logits = model.lm_head(hidden[:, :-1][answers]).float()
    terms = -cross_entropy(logits, ids[:, 1:][answers], reduction="none")
    sums = terms.new_zeros(len(ids)).index_add(0, answers.nonzero()[:, 0], terms)
    chosen, rejected = sums.chunk(2)
    loss = -logsigmoid(0.1 * (chosen - rejected)).mean()
    loss.backward()
    gradients = {name: weight.grad.float() for name, weight in model.named_parameters() if weight.grad is not None}
    return hidden.detach()[mask.bool()].float(), float(loss.detach()), gradients


def distances(one, other):
    """Relative: hidden states and all gradients by their norm, the loss, and the weight whose gradient is worst."""
    (states, loss, gradients), (states2, loss2, gradients2) = one, other
    names = list(gradients2)
    apart = {name: float((gradients[name] - gradients2[name]).norm()) for name in names}
    norms = {name: float(gradients2[name].norm()) for name in names}
    worst = max(names, key=lambda name: apart[name] / max(norms[name], 1e-12))
    return {
        "hidden": float((states - states2).norm() / states2.norm()),
        "loss": abs(loss - loss2) / abs(loss2),
        "gradient": math.hypot(*apart.values()) / math.hypot(*norms.values()),
        "worst": apart[worst] / max(norms[worst], 1e-12),
        "worst_weight": worst,
    }


# --- function: does it run? ----------------------------------------------------------------------------------------


def on_device(told):
    return f"trl.use_cpu={'true' if told['device'] == 'cpu' else 'false'}"


def small_model(told):
    """A folder with a model of 5M parameters, random weights written out."""
    from speed import make_model

    folder = Path(told["work"]) / "small"
    if not (folder / "model.safetensors").exists():
        make_model(folder, "5m")
    return folder


def small_words(row, told):
    """Overrides of a run of 8 steps on embedded pairs."""
    model = f"model=local model.path={small_model(told)} trl.max_length=512" if row["model"] == "small" else ""
    return [*model.split(), *SMALL.split(), f"method={row['method']}", f"model.tuning={row['tuning']}", on_device(told)]


def try_method(row, told):
    """A run of 8 steps with both probes, to its end."""
    from dpo_kit import compose, train
    from dpo_kit.run.files import read_json

    folder = Path(told["work"]) / "runs" / row["key"].replace(" ", "-")
    result = train(compose(small_words(row, told)), folder)
    device = read_json(folder / "trl_config.json").get("use_cpu")
    start, end = (each.get("probe/kl_forward_rb_nats", math.nan) for each in (result.start, result.final))
    detail = f"{result.steps} steps in {result.seconds['train']:.1f} s on {'the CPU' if device else 'the GPU'}"
    return {"detail": f"{detail}; forward KL {start:.2g} → {end:.2g} nats", "run": str(folder)}


def try_tool(row, told):
    """A tool on the run of DPO."""
    import importlib

    tool = importlib.import_module(f"dpo_kit.{row['tool']}.__main__")
    folder = Path(told["work"]) / "runs" / row["of"]
    if not (folder / "result.json").exists():
        raise RuntimeError("the run that it takes is not there")
    if code := tool.main([f"run={folder}", *row["words"]]):
        raise RuntimeError(f"exit code {code}")
    return {"detail": f"of the run {row['of']}"}


# --- function: commands --------------------------------------------------------------------------------------------


def start_command(told, *words):
    """A command as a user types it, its output kept in a file of its own."""
    log = Path(tempfile.mkdtemp(dir=told["work"])) / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dpo_kit", *words], stdout=output, stderr=subprocess.STDOUT, cwd=told["work"]
        )
    process.log = log
    return process


def finish(process, expected=0):
    if process.wait() != expected:
        lines = [line for line in process.log.read_text().splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("PEAK_MIB")]  # of a bundle for bare GPU machines
        raise RuntimeError(f"exit code {process.returncode}: {lines[-1] if lines else ''}")


def try_resume(row, told):
    """A run that is killed after a checkpoint and goes on, beside one that is not: are their weights the same?"""
    words = [*small_words(row, told), "trl.max_steps=48", "trl.save_steps=4", "trl.eval_steps=16"]
    whole, torn = (Path(told["work"]) / name for name in ("whole", "torn"))
    unbroken = start_command(told, *words, f"hydra.run.dir={whole}")
    process = start_command(told, *words, f"hydra.run.dir={torn}")
    while process.poll() is None and not any(torn.glob("checkpoints/checkpoint-*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finish(unbroken)
    killed_at = max((int(each.name.split("-")[-1]) for each in torn.glob("checkpoints/checkpoint-*")), default=0)
    if (torn / "result.json").exists() and json.loads((torn / "result.json").read_text())["status"] == "done":
        raise RuntimeError("it had ended before it could be killed")
    finish(start_command(told, *words, f"hydra.run.dir={torn}"))
    return {"detail": f"killed after checkpoint {killed_at} of 48 steps; {compare_weights(whole, torn)}"}


def try_plan(row, told):
    """Planned and measured peak of three steps."""
    out = Path(told["work"]) / "plan.json"
    finish(start_command(told, "plan", *small_words(row, told), "first_step=true", f"out={out}"))
    found = json.loads(out.read_text())
    planned, measured = found["peak"], found["measured"]["peak"]
    detail = f"{planned / 1e6:,.0f} MB planned, {measured / 1e6:,.0f} MB measured: {planned / measured:.2f}"
    return {"detail": detail, "planned": planned, "measured": measured}


def compare_weights(one, other):
    """Whether two runs' models are the same to the last bit, else the weight that differs most."""
    files = [next((folder / "model").glob("*.safetensors")) for folder in (one, other)]
    if files[0].read_bytes() == files[1].read_bytes():
        return "its weights equal those of a run that was never stopped, bit for bit"
    from safetensors.torch import load_file

    here, there = map(load_file, files)
    apart = {name: float((here[name].float() - there[name].float()).abs().max()) for name in here}
    worst = max(apart, key=apart.get)
    differing = sum(value > 0 for value in apart.values())
    return f"{differing} of {len(apart)} weights differ from an unbroken run's, {worst} most, by {apart[worst]:.1e}"


def try_sweep(row, told):
    folder = Path(told["work"]) / "sweep"
    finish(start_command(told, *small_words(row, told), "beta-sweep=standard", f"hydra.sweep.dir={folder}"))
    best = json.loads((folder / "best.json").read_text())
    runs = [json.loads(path.read_text())["status"] for path in folder.glob("*/result.json")]
    return {"detail": f"{runs.count('done')} of {len(runs)} runs done; choice: {best['recommended'] or 'none'}"[:120]}


def time_demo(row, told):
    started = time.perf_counter()
    finish(start_command(told, "tracking=none", f"hydra.run.dir={told['work']}/demo"))
    seconds = time.perf_counter() - started
    training = json.loads(Path(told["work"], "demo", "result.json").read_text())["seconds"]["train"]
    return {"seconds": seconds, "detail": f"{seconds:.1f} s, of which training with all measuring {training:.1f} s"}


def time_four(row, told):
    """A sweep of four betas beside one run of `trl dpo`, as commands, on models that are read from the disk."""
    import speed

    speed.WORK = Path(tempfile.mkdtemp(dir=told["work"]))
    speed.set_shapes(row["pairs"], row["longer"])
    speed.make_model(speed.WORK / "model", row["size"])
    means, spread, _, pairs = speed.SHAPES[row["shape"]]
    speed.make_pairs(speed.WORK / row["shape"], means, spread, pairs)
    speed.make_pairs(speed.WORK / "eval", (20, 10, 10), 0.1, 8)
    ours = speed.our_sweep(row["shape"])["wall"]
    theirs = speed.stock(row["shape"])["wall"]
    return {"stock": theirs, "ours": ours, "pairs": pairs, "ratio": len(speed.BETAS) * theirs / ours}


MEASURES = {
    "imports": imports,
    "product": product,
    "exactness": measure_exactness,
    "sampling": measure_sampling,
    "ours": measure_ours,
    "stock": measure_stock,
    "probe": measure_probe,
    "method": try_method,
    "tool": try_tool,
    "plan": try_plan,
    "resume": try_resume,
    "sweep": try_sweep,
    "demo": time_demo,
    "four": time_four,
}

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
