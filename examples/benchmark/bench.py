"""Start-up seconds, the demo, and the cost of the probe, as `make bench` prints them.

    python examples/benchmark/bench.py [model=DIR train=FILE eval=FILE measured_steps=300 out=bench.json]

Without arguments the embedded model and pairs are measured. The probe's share is the time inside its callbacks over the
time of a run of 300 steps with evaluations every 100, both taken in one run; where `measured_steps` is smaller, that
many steps are run, with the same number of evaluations, and the time of a step is multiplied.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

STEPS = 300


def main(arguments):
    options = dict(argument.split("=", 1) for argument in arguments)
    rows = [
        ("python -m dpo_kit --help, seconds", start_up("--help")),
        ("python -m dpo_kit --cfg job, seconds", start_up("--cfg", "job")),
        *demo(),
        *probe_cost(options),
    ]
    table = Table("measure", "value", title="median of 5 for start-up, one run for the rest")
    for name, value in rows:
        table.add_row(name, f"{value:.3g}")
    Console().print(table)
    if "out" in options:
        Path(options["out"]).write_text(json.dumps(dict(rows), indent=2) + "\n")


def start_up(*words):
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dpo_kit", *words], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def demo():
    """Seconds and memory of `python -m dpo_kit`, the largest of the processes that this one has started."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        words = [sys.executable, "-m", "dpo_kit", "tracking=none", f"hydra.run.dir={folder}"]
        subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        seconds = time.perf_counter() - started
        training = json.loads((Path(folder) / "result.json").read_text())["seconds"]["train"]
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return [
        ("the demo, python -m dpo_kit, seconds", seconds),
        ("of these its training with all measuring, seconds", training),
        ("its peak memory, GiB", memory),
    ]


def probe_cost(options):
    from dpo_kit import compose, train
    from dpo_kit.callbacks import callbacks
    from dpo_kit.run.history import read_metrics
    from dpo_kit.trainer import reference_store as reference

    spent = timed(callbacks._Measuring, "_report")
    passes = timed(reference, "reference_logps")
    measured_steps = int(options.get("measured_steps", STEPS))
    os.environ["DPO_KIT_CACHE"] = tempfile.mkdtemp()  # the pass is to be measured, not read
    overrides = ["tracking=none", f"trl.max_steps={measured_steps}", f"trl.eval_steps={measured_steps // 3}"]
    overrides += ["trl.save_strategy=no", "data.gold=null", "speed.reference_store=true"]
    if "model" in options:
        overrides += ["model=local", f"model.path={options['model']}"]
    if "train" in options:
        overrides += ["data=jsonl", f"data.train={options['train']}", f"data.eval={options.get('eval', 'null')}"]
    overrides += ["trl.per_device_train_batch_size=8", f"trl.max_length={options.get('max_length', 512)}"]
    result = train(compose(overrides), Path(tempfile.mkdtemp()) / "run")
    history = read_metrics(Path(result.run_dir) / "metrics.jsonl")
    evaluation = sum(row.get("eval_runtime", 0) for row in history)
    step = (result.seconds["train"] - sum(spent) - evaluation) / measured_steps
    run = sum(passes) + STEPS * step + evaluation
    return [
        (f"training step of 8 pairs, seconds (mean of {measured_steps})", step),
        (f"reference pass, {STEPS} such steps and 3 of TRL's own evaluations, seconds", run),
        ("the probe at start, 3 evaluations and end, seconds", sum(spent)),
        ("the probe's share, %", 100 * sum(spent) / run),
    ]


def timed(owner, name):
    """The seconds of each further call of `owner.name`, as a list that grows."""
    seconds, honest = [], getattr(owner, name)

    def measured(*args, **kwargs):
        started = time.perf_counter()
        try:
            return honest(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, name, measured)
    return seconds


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
