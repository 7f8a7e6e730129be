"""Start-up seconds and the cost of the probe, as `make bench` prints them.

    python examples/benchmark/bench.py [model=DIR train=FILE eval=FILE measured_steps=300 out=bench.json]

Without arguments the embedded model and pairs are measured. The probe's share is the time inside its callbacks over the
time of a run of 300 steps with evaluations every 100, both taken in one run; where `measured_steps` is smaller, that
many steps are run, with the same number of evaluations, and the time of a step is multiplied.
"""

import json
import os
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
        *probe_cost(options),
    ]
    table = Table("measure", "value", title="median of 5 for start-up; one run for the probe")
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


def probe_cost(options):
    from dpo_kit import callbacks, compose, train
    from dpo_kit.history import read_metrics

    spent = []
    measured = callbacks._Measuring._report

    def timed(self, *args, **kwargs):
        started = time.perf_counter()
        try:
            return measured(self, *args, **kwargs)
        finally:
            spent.append(time.perf_counter() - started)

    callbacks._Measuring._report = timed
    measured_steps = int(options.get("measured_steps", STEPS))
    overrides = ["tracking=none", f"trl.max_steps={measured_steps}", f"trl.eval_steps={measured_steps // 3}"]
    overrides += ["trl.save_strategy=no", "data.gold=null"]
    if "model" in options:
        overrides += ["model=local", f"model.path={options['model']}"]
    if "train" in options:
        overrides += ["data=jsonl", f"data.train={options['train']}", f"data.eval={options.get('eval', 'null')}"]
    overrides += ["trl.per_device_train_batch_size=8", f"trl.max_length={options.get('max_length', 512)}"]
    result = train(compose(overrides), Path(tempfile.mkdtemp()) / "run")
    history = read_metrics(Path(result.run_dir) / "metrics.jsonl")
    evaluation = sum(row.get("eval_runtime", 0) for row in history)
    step = (result.seconds["train"] - sum(spent) - evaluation) / measured_steps
    run = STEPS * step + evaluation
    return [
        (f"training step of 8 pairs, seconds (mean of {measured_steps})", step),
        (f"{STEPS} such steps and 3 of TRL's own evaluations, seconds", run),
        ("the probe at start, 3 evaluations and end, seconds", sum(spent)),
        ("the probe's share, %", 100 * sum(spent) / run),
    ]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
