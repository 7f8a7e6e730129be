"""`python -m dpo_kit plan [overrides]`: what a run will take, before it runs: memory, steps, tokens, disk, a launcher.

No weights are loaded: the model's config and the checked rows are enough. `first_step=true` also takes three steps and
compares.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.config.compose import check, compose_unchecked, refuse_idle
from dpo_kit.config.settings import Settings
from dpo_kit.config.tools import parse, refuse_no_file, run_tool, usage
from dpo_kit.errors import ConfigError
from dpo_kit.model.origin import refuse_unusable
from dpo_kit.run.files import write_json
from dpo_kit.run.other_tools import refuse_dashes
from dpo_kit.run.quiet import quiet_imports
from dpo_kit.run.words import command

if TYPE_CHECKING:
    from dpo_kit.data.prepare import Prepared

OWN = ("first_step", "out")
POLL_SECONDS = 0.005
LOOK_AT_FILES = 50  # polls between two looks at which weights lie in mapped files, which takes longer
CARDS = (24, 40, 80, 141)  # GB of memory that accelerators have
USABLE = 0.9  # of it: the rest is the driver's, the allocator's and the estimate's error
LARGE = 80
SHOWN = 5  # places of dropped rows, of each reason
LAUNCH = "accelerate launch --config_file examples/accelerate"
THREE_STEPS = (
    "trl.max_steps=3", "trl.save_strategy=no", "trl.save_steps=null", "trl.eval_strategy=no", "trl.eval_steps=null",
    "trl.logging_strategy=steps", "trl.logging_steps=1", "tracking=none", "resume=never",
)  # fmt: skip
LABELS = {
    "parameters": "weights", "reference": "reference model", "optimizer": "optimizer", "gradients": "gradients",
    "passes": "at most in forward and backward pass", "activations": "activations of a batch",
    "copies": "half-precision copies", "recomputed": "activations computed again", "logits": "logits of a batch",
    "measuring": "while the probe measures", "libraries": "libraries",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """`memory`: bytes by what they are for; `peak`: of one process; `disk`: of checkpoints and model."""

    memory: dict[str, int]
    peak: int
    steps: int
    batch: int
    epochs: float
    tokens: int
    disk: int
    parameters: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 done, 1 failed, 2 refused."""
    return run_tool("plan", usage(__file__), arguments, plan)


def plan(arguments: Sequence[str]) -> None:
    """Plan the run that `arguments` describe, and print it. Raises ConfigError, DataError, ModelError."""
    options, overrides = split_words(arguments)
    if "out" in options:
        refuse_no_file("out", options["out"])
    settings = check(compose_unchecked(overrides))
    refuse_idle(settings, overrides)
    refuse_unusable(settings)
    quiet_imports()
    planned = plan_run(settings)
    measured = measure_first_steps(overrides) if options.get("first_step") == "true" else {}
    show(planned, settings, measured, overrides)
    if "out" in options:
        write_json(Path(options["out"]), vars(planned) | {"measured": measured})


def split_words(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The tool's own keys, and the overrides of the run. Raises ConfigError."""
    refuse_dashes(arguments, arguments)
    for word in arguments:
        if "=" not in word:
            raise ConfigError(f"arguments are key=value, got {word}; did you mean model=local model.path={word}?")
    own = [word for word in arguments if word.partition("=")[0] in OWN]
    options = parse(own, OWN)
    if options.get("first_step", "false") not in ("true", "false"):
        raise ConfigError(f"first_step must be true or false, got {options['first_step']}")
    return options, [word for word in arguments if word not in own]


def plan_run(settings: Settings) -> Plan:
    """The plan of one run; its rows are read and checked, nothing is written."""
    return plan_on(settings, _read_rows(settings)[1])


def _read_rows(settings: Settings) -> tuple[Any, Prepared]:
    """The run's tokenizer, and its rows as training reads them."""
    from dpo_kit.model.load import load_tokenizer
    from dpo_kit.run.quiet import quiet_libraries
    from dpo_kit.trainer.rows import read_data

    quiet_libraries()
    tokenizer = load_tokenizer(settings.model)
    return tokenizer, read_data(settings, tokenizer)


def plan_on(settings: Settings, data: Prepared) -> Plan:
    """The plan of a run on `data`."""
    from dpo_kit.data.other_rows import with_answer_lengths
    from dpo_kit.trainer.arguments import count_steps, effective_batch
    from dpo_kit.trainer.build import choose_arguments, needs_reference
    from dpo_kit.trainer.memory import build_weightless, estimate
    from dpo_kit.trainer.resume.safe_trainer import OPTIMIZER_VALUES

    args = choose_arguments(settings, data, Path(tempfile.gettempdir()) / "dpo_kit-plan")
    trl = args.to_dict()
    model = build_weightless(settings, args)
    needs, shares = needs_reference(settings, args), settings.speed.share_prefix is not False
    memory = estimate(model, settings, args, data.train, loads_reference=needs, shares=shares)
    steps, batch = count_steps(trl, len(data.train)), effective_batch(trl)
    # of a row: prompt and answers, each once; answers that are drawn as long as they may be
    rows = (row["tokens"] for row in with_answer_lengths(data.train, trl.get("max_new_tokens")))
    tokens = sum(count for row in rows for name, count in row.items() if name != "cut") / len(data.train)
    kept = (args.save_total_limit or 1) + 1 if args.save_strategy != "no" else 0
    return Plan(
        memory=dict(vars(memory)),
        peak=memory.peak(args.gradient_accumulation_steps > 1),
        steps=steps,
        batch=batch,
        epochs=steps * batch / len(data.train),
        tokens=int(steps * batch * tokens),
        disk=memory.gradients * ((settings.callbacks.path or 1) + kept * (1 + OPTIMIZER_VALUES)),
        parameters=sum(p.numel() for p in model.parameters()),
    )


# --- first steps -------------------------------------------------------------------------------------------------


class PeakMemory:
    """The most memory that a block takes beyond what was there before it: of the accelerator where there is one, else
    of this process, looked at every few milliseconds, with the weights that are only read, from their files. Bytes.
    """

    def __enter__(self) -> PeakMemory:
        import torch

        self.cuda = torch.cuda if torch.cuda.is_available() else None
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
        self.before = self.bytes = 0 if self.cuda else anonymous_memory()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        self.bytes = self.cuda.max_memory_allocated() if self.cuda else self.bytes - self.before

    def _watch(self) -> None:
        import psutil

        polls = mapped = 0
        while not self.cuda and not self._ended.wait(POLL_SECONDS):
            if polls % LOOK_AT_FILES == 0:  # safetensors files that lie in this process's memory unchanged
                maps = psutil.Process().memory_maps()
                mapped = sum(part.rss - part.anonymous for part in maps if part.path.endswith(".safetensors"))
            self.bytes = max(self.bytes, anonymous_memory() + mapped)
            polls += 1


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    import psutil

    if not psutil.LINUX:
        needed = "a system that says how much memory a process takes (Linux)"
        raise ConfigError(f"first_step=true needs {needed}: leave it out")
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def measure_first_steps(overrides: Sequence[str]) -> dict[str, float]:
    """Peak memory in bytes and seconds a step of the run's first steps, with the probe's first and last measurement."""
    from dpo_kit.config.compose import compose
    from dpo_kit.run.history import read_metrics
    from dpo_kit.training import train

    keys = tuple(word.split("=")[0] + "=" for word in THREE_STEPS)
    cfg = compose([*(word for word in overrides if not word.startswith(keys)), *THREE_STEPS])
    with tempfile.TemporaryDirectory() as folder:
        with PeakMemory() as peak:
            train(cfg, Path(folder) / "run")
        rows = [row for row in read_metrics(Path(folder) / "run" / "metrics.jsonl") if "loss" in row]
    return {"peak": peak.bytes, "seconds_per_step": rows[2]["time"] - rows[1]["time"]}


# --- showing -----------------------------------------------------------------------------------------------------


def show(planned: Plan, settings: Settings, measured: dict[str, float], words: Sequence[str]) -> None:
    """The tables, and the command to start the run with, whose overrides are `words`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{settings.method.name}, {settings.model.tuning} tuning of {settings.model.path}")
    table.add_column("memory of one process")
    table.add_column("GB", justify="right")
    for name, label in LABELS.items():
        table.add_row(label, f"{planned.memory[name] / 1e9:.2f}")
    table.add_section()
    table.add_row("peak (not all at the same time)", f"{planned.peak / 1e9:.2f}")
    if measured:
        table.add_row("measured in three steps", f"{measured['peak'] / 1e9:.2f}")
    speed = f", {measured['seconds_per_step']:.2f} s a step" if measured else ""
    lines = [
        f"{planned.steps} steps of {planned.batch} rows, {planned.epochs:.2f} epochs, "
        f"{planned.tokens / 1e6:.2f}M tokens{speed}; {planned.disk / 1e9:.2f} GB of disk for checkpoints and model"
    ]
    if not planned.memory["passes"]:
        why = "which cannot be counted for this model"
        lines.append(f"without the activations, {why}: plan first_step=true measures them")
    Console().print(table)
    for line in (*lines, advise(planned, settings, words)):
        Console().print(line, highlight=False, markup=False, soft_wrap=True)


def advise(planned: Plan, settings: Settings, words: Sequence[str] = ()) -> str:
    """How to start the run: on one device where its memory suffices, else sharded over several, else cheaper."""
    fitting = find_devices(planned, settings)
    if fitting is None:
        return (
            "fits no usual device: take trl.gradient_checkpointing=true, a smaller trl.per_device_train_batch_size "
            "with more trl.gradient_accumulation_steps, a smaller trl.max_length, or model.tuning=lora or qlora"
        )
    (devices, card), run = fitting, command(*words) if words else "python -m dpo_kit …"
    launched = run.removeprefix("python ")
    if devices == 1:
        return f"fits one device of {card} GB: {run}\non several: {LAUNCH}/ddp.yaml {launched}"
    return f"fits {devices} devices of {card} GB, sharded: {LAUNCH}/fsdp2.yaml --num_processes {devices} {launched}"


def find_devices(planned: Plan, settings: Settings) -> tuple[int, int] | None:
    """(devices, GB of each): the least that the run fits, one card or several that share what they can, or None."""
    split = sum(planned.memory[name] for name in ("parameters", "reference", "optimizer", "gradients"))
    rest = max(0, planned.peak - split)
    fitting = [(1, card) for card in CARDS if planned.peak <= USABLE * card * 1e9]
    if settings.model.tuning != "qlora":
        fitting += [(n, LARGE) for n in (2, 4, 8, 16, 32) if split / n + rest <= USABLE * LARGE * 1e9]
    return fitting[0] if fitting else None


# --- a dry run ---------------------------------------------------------------------------------------------------


def dry_run(settings: Settings, words: Sequence[str] = ()) -> None:
    """Read, check, tokenise; show dropped rows, a row as it is trained on, the plan with `words`; write nothing."""
    tokenizer, data = _read_rows(settings)
    sys.stdout.write("".join(f"{path} is read as {form}\n" for path, form in data.report["forms"].items()))
    sys.stdout.write(show_dropped(data))
    sys.stdout.write(show_row(data.train[0], tokenizer, settings.trl) + "\n\n")
    show(plan_on(settings, data), settings, {}, words)
    sys.stdout.write("nothing was trained or written: dry_run=true\n")


def show_dropped(data: Prepared) -> str:
    """How many rows training would drop, by reason, each with the lines of some."""
    places: dict[str, list[str]] = {}
    for fault in data.dropped:
        places.setdefault(fault.reason, []).append(fault.place)
    rows = data.report["used"]["rows"]
    counts = f"{rows['train']:,} to train on, {rows['select']:,} and {rows['test']:,} held out"
    lines = [f"rows: {counts}, {len(data.dropped):,} dropped"]
    for reason, dropped in places.items():
        more = ", …" if len(dropped) > SHOWN else ""
        lines.append(f"  {len(dropped):,} ({reason}): {', '.join(dropped[:SHOWN])}{more}")
    return "\n".join([*lines, "", ""])


def show_row(row: dict[str, Any], tokenizer: Any, trl: dict[str, Any]) -> str:
    """One row as the loss sees it: what is read, what is scored (after the mark), what `max_length` cuts."""
    from dpo_kit.model.tokens import Truncation, ids_of_rows

    names = [name for name in ("chosen", "rejected", "completion") if name in row]
    ((prompt, answers),) = ids_of_rows(tokenizer, [row], names)
    of_row, limit = f"a row as it is trained on ({row['pair_id']}):", trl["max_length"]
    if not names:
        drawn = f"two answers of at most {trl['max_new_tokens']} tokens, drawn and compared"
        return f"{of_row}\n{tokenizer.decode(prompt)}▶ {drawn}"
    lines = [f"{of_row} the prompt is read, what follows ▶ is scored"]
    for name, answer in zip(names, answers, strict=True):
        read, scored = Truncation.of(trl).cut(prompt, answer)
        cut = len(prompt) + len(answer) - len(read) - len(scored)
        counts = f"{len(read)} + {len(scored)} tokens" + (f", {cut} cut by trl.max_length={limit}" if cut else "")
        lines.append(f"{name} ({counts}):\n{tokenizer.decode(read)}▶{tokenizer.decode(scored)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
