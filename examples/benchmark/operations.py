"""How many operations one training step dispatches, dpo_kit beside stock TRL, as the host of a GPU would.

    python examples/benchmark/operations.py [layers=24] [pairs=8] [steps=3] [where=true] [out=FILE]

Below some billion parameters a GPU waits for its host, which needs about as long for a small operation as for a large
one: what counts is their number. It is counted on a CPU, on a deep and narrow Qwen2 of random weights in bf16, with
`layers` layers and `pairs` prompt-heavy pairs a step. `where=true` prints besides which operations are more with
dpo_kit, with the line that asks for them, and each wait for the device.
"""

import contextlib
import functools
import json
import os
import re
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from speed import make_pairs

OPTIONS = {"layers": "24", "pairs": "8", "steps": "3", "where": "false", "out": ""}
LENGTHS, SPREAD, LONGEST = (18, 8, 9), 0.58, 64  # prompt-heavy, but short: as many operations, in less time
MODEL = {  # heads as Qwen2.5-0.5B has them, and a vocabulary that TRL's head cuts into as many tiles
    "hidden_size": 56,
    "intermediate_size": 64,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
TILES = 5  # of Qwen2.5's vocabulary in TRL's head
ARMS = {
    "TRL as it comes": {},
    "TRL, no checkpointing": {"gradient_checkpointing": False},
    "padded TRL": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},  # like with like
}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
NO_KERNEL |= {"resize_", "set_", "_local_scalar_dense", "item"}  # memory, shapes; the copy of a wait is counted as such
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
WITHIN = re.compile(r"[/\\](torch[/\\]|contextlib\.py)")  # frames that no line of a model or trainer is in
HIDDEN_WAITS = ("tolist", "cpu", "numpy")  # of which a CPU's tensors dispatch nothing


class Counting(TorchDispatchMode):
    """The operations below autograd and autocast that launch a kernel on a GPU, those of the backward pass too.

    Left out is what only names memory anew (views) or reserves it: that costs a host a tenth of a launch, and both
    sides alike. What is one kernel on a GPU and several operations on a CPU counts once, inside `as_one`.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.places, self.waits = Counter(), Counter(), Counter()
        self.steps, self.paused = [], True

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # nothing is compiled here, and what keeps the compiler away takes a millisecond per operation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.paused:
            name, launches = described(func)
            if name in WAITS or is_masked(name, args):
                self.waits[f"{name} at {place()}"] += 1
            if launches:
                self.count(name)
        return func(*args, **(kwargs or {}))

    def count(self, name):
        self.operations[name] += 1
        self.places[f"{name} at {place()}"] += 1

    @contextlib.contextmanager
    def as_one(self, name=None):
        """Inside, nothing is counted but one operation called `name`."""
        before, self.paused = self.paused, True
        if not before and name:
            self.count(name)
        try:
            yield
        finally:
            self.paused = before

    def next_step(self):
        """Begin to count a step; what was counted of the last one is kept."""
        if not self.paused:
            self.steps.append((self.operations, self.places, self.waits))
        self.operations, self.places, self.waits, self.paused = Counter(), Counter(), Counter(), False


@functools.cache
def described(func):
    """The name of an operation, and whether it launches a kernel."""
    name = func.overloadpacket.__name__
    return name, not (func.is_view or name in NO_KERNEL)


def is_masked(name, args):
    """Whether rows are taken by a mask, of which a GPU must first tell the host how many there are."""
    chosen = args[1] if name in ("index", "index_put", "_index_put_impl_") else ()
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in chosen)


class AsOne(torch.autograd.Function):
    """A function of tensors that counts as one operation, and so does its backward pass."""

    @staticmethod
    def forward(ctx, counting, name, function, *tensors):
        ctx.counting, ctx.label = counting, name
        with counting.as_one(name), torch.enable_grad():
            ctx.given = [tensor.detach().requires_grad_() for tensor in tensors]
            ctx.result = function(*ctx.given)
            return ctx.result.detach()

    @staticmethod
    def backward(ctx, gradient):
        with ctx.counting.as_one(f"{ctx.label}_backward"):
            return None, None, None, *torch.autograd.grad(ctx.result, ctx.given, gradient)


def place():
    """The line that asks for the present operation: the innermost outside PyTorch; in a backward pass its node."""
    node = torch._C._current_autograd_node()
    frame = sys._getframe(2)
    while frame is not None and (WITHIN.search(frame.f_code.co_filename) or frame.f_globals is globals()):
        frame = frame.f_back
    if node is not None and (frame is None or "accelerate" in frame.f_code.co_filename):
        return f"backward of {node.name()}"
    parts = Path(frame.f_code.co_filename).parts
    return f"{'/'.join(parts[-3:] if 'site-packages' in parts else parts[-2:])}:{frame.f_lineno}"


def wrapped(counting, function, name):
    """`function` without gradient that counts as one operation."""

    def one(*args, **kwargs):
        with counting.as_one(name):
            return function(*args, **kwargs)

    return one


def varlen_attn(query, key, value, query_ends, key_ends, *longest, scale, window_size, **grouped):
    """PyTorch's `torch.nn.attention.varlen.varlen_attn`, which CPUs do not have, without windows."""
    parts = ((query, query_ends), (key, key_ends), (value, key_ends))
    rows = zip(*(tensor.transpose(0, 1).split(ends.diff().tolist(), 1) for tensor, ends in parts), strict=True)
    attended = [
        scaled_dot_product_attention(q, k, v, causal_mask(q.shape[1], k.shape[1]), scale=scale, **grouped)
        for q, k, v in rows
    ]
    return torch.cat(attended, 1).transpose(0, 1)


def causal_mask(queries, keys):
    """The last query stands at the last key."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def as_on_a_gpu(counting):
    """What differs on a GPU: TRL's head scores labelled positions, one Triton kernel a tile; our attention is one call
    for all rows, and an RMSNorm one kernel.
    """
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    from dpo_kit.trainer import on_gpu, prefix, speed

    def one_call(query, key, value, *ends, **options):
        return AsOne.apply(
            counting, "varlen_attn", lambda *tensors: varlen_attn(*tensors, *ends, **options), query, key, value
        )

    def rms_norm(hidden, shape, weight, eps):
        return AsOne.apply(counting, "rms_norm", lambda h, w: torch.rms_norm(h, shape, w, eps), hidden, weight)

    changes = [
        (utils, "_use_triton", lambda device: True),
        (utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", -(-MODEL["vocab_size"] // TILES)),
        (speed, "has_accelerator", lambda: True),
        (prefix, "takes_one_call", lambda query, value: True),
        (on_gpu, "varlen_attn", one_call),
        (prefix.Layout, "fill_up", lambda layout, step: layout),
        (on_gpu, "rms_norm", rms_norm),
    ]
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        changes.append((chunked_logprob, name, wrapped(counting, getattr(chunked_logprob, name), name)))
    return changed(changes)


@contextlib.contextmanager
def changed(changes):
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(patch.object(owner, name, value))
        yield


def hidden_waits_counted(counting):
    def noticing(name, honest):
        def call(tensor, *args):
            if not counting.paused:
                counting.waits[f"{name} at {place()}"] += 1
            return honest(tensor, *args)

        return call

    return changed([(torch.Tensor, name, noticing(name, getattr(torch.Tensor, name))) for name in HIDDEN_WAITS])


# --- the steps -----------------------------------------------------------------------------------------------------


def count_steps(counting, trainer, steps):
    """(operations, places, waits) of each of `steps` steps of `trainer`, from one batch that is fetched to the next.

    Two more are trained: the first makes the optimizer's state, the last ends the run.
    """
    fetch = trainer.get_batch_samples

    def fetch_uncounted(*args):
        with counting.as_one():
            batch = fetch(*args)
        counting.next_step()
        return batch

    trainer.get_batch_samples = fetch_uncounted
    with hidden_waits_counted(counting), counting:
        trainer.train()
    return counting.steps[1 : steps + 1]


def stock_steps(work, options, given):
    """Steps of TRL's trainer, its defaults but for what `given` says."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(work / "stock"),
        per_device_train_batch_size=int(options["pairs"]),
        max_steps=int(options["steps"]) + 2,
        max_length=LONGEST,
        use_cpu=True,
        bf16=True,
        save_strategy="no",
        report_to="none",
        model_init_kwargs={"dtype": "float32"},
        disable_tqdm=True,
        logging_steps=1000,
        **given,
    )
    rows = load_dataset("json", data_files=str(work / "pairs" / "train.jsonl"), split="train")
    counting = Counting()
    with as_on_a_gpu(counting):
        trainer = DPOTrainer(model=str(work / "model"), args=args, train_dataset=rows)
        return count_steps(counting, trainer, int(options["steps"]))


class Counted(Exception):  # noqa: N818  it ends a run, and is no error
    """All steps are counted, and the run need not go on to its end."""


def our_steps(work, options):
    """Steps of the trainer that dpo_kit builds, with its defaults and callbacks."""
    from dpo_kit import compose, train, training

    found, counting = [], Counting()

    def run_trainer(trainer, *told):
        found.extend(count_steps(counting, trainer, int(options["steps"])))
        raise Counted

    words = ["model=local", f"model.path={work}/model", "data=jsonl", f"data.train={work}/pairs/train.jsonl"]
    words += [f"data.eval={work}/eval/train.jsonl", "tracking=none", "callbacks=none", "trl.eval_strategy=no"]
    words += [f"trl.per_device_train_batch_size={options['pairs']}", f"trl.max_length={LONGEST}"]
    words += [f"trl.max_steps={int(options['steps']) + 2}", "trl.bf16=true", "trl.save_strategy=no"]
    words += ["speed.reference_store=true", "trl.logging_steps=1000"]
    with as_on_a_gpu(counting), patch.object(training, "run_trainer", run_trainer), contextlib.suppress(Counted):
        train(compose(words), work / "run")
    return found


def make_model(folder, layers):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from dpo_kit.toy import MODEL as TOY

    tokenizer = AutoTokenizer.from_pretrained(TOY)
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    Qwen2ForCausalLM(
        Qwen2Config(**MODEL, **special, num_hidden_layers=layers, tie_word_embeddings=True)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(options, arms=ARMS):
    """The steps of each of TRL's `arms`, and of dpo_kit."""
    options = OPTIONS | options
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, DPO_KIT_CACHE=f"{folder}/cache"):
        work = Path(folder)
        make_model(work / "model", int(options["layers"]))
        pairs = int(options["pairs"]) * (int(options["steps"]) + 2)
        make_pairs(work / "pairs", LENGTHS, SPREAD, pairs)
        make_pairs(work / "eval", (20, 10, 10), 0.1, 8)
        found = {name: stock_steps(work, options, given) for name, given in arms.items()}
        found["dpo_kit"] = our_steps(work, options)
    return found


def total(steps):
    """Operations of a step, the median of `steps`."""
    return statistics.median(sum(operations.values()) for operations, *_ in steps)


def show(found):
    least = total(found["padded TRL"])
    table = Table("a training step of", "operations", "of padded TRL", "waits for the device", box=MARKDOWN)
    for name, steps in found.items():
        waits = statistics.median(sum(waits.values()) for *_, waits in steps)
        table.add_row(name, f"{total(steps):,.0f}", f"{total(steps) / least:.2f}", f"{waits:.0f}")
    Console(width=120).print(table)


def show_where(found):
    """The operations of which ours are more, by name and by line, and every wait."""
    ours, theirs = (found[name][len(found[name]) // 2] for name in ("dpo_kit", "padded TRL"))
    for title, part, most in (("operation", 0, 15), ("operation and line", 1, 40), ("wait", 2, 60)):
        more = ours[part] - theirs[part] if part < 2 else ours[part] | theirs[part]
        table = Table(title, "padded TRL", "dpo_kit", box=MARKDOWN)
        for key, _ in more.most_common(most):
            table.add_row(key, str(theirs[part][key]), str(ours[part][key]))
        Console(width=160).print(table)


def main(arguments):
    options = dict(argument.split("=", 1) for argument in arguments)
    if unknown := options.keys() - OPTIONS:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(OPTIONS)}")
    found = measure(options)
    show(found)
    if options.get("where") == "true":
        show_where(found)
    if options.get("out"):
        Path(options["out"]).write_text(json.dumps({name: total(steps) for name, steps in found.items()}) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
