"""Start-up seconds and the cost of the probe, as `make bench` prints them.

    python examples/benchmark/bench.py [model=DIR train=FILE eval=FILE] [steps=300] [out=bench.json]

Without arguments the embedded model and pairs are measured. The cost of the probe is the time inside its callbacks over
the time of the run without them, both taken in one run.
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
    from dpo_kit import callbacks, compose
    from dpo_kit.training import train

    spent = []
    measured = callbacks._Measuring._report

    def timed(self, *args, **kwargs):
        started = time.perf_counter()
        try:
            return measured(self, *args, **kwargs)
        finally:
            spent.append(time.perf_counter() - started)

    callbacks._Measuring._report = timed
    steps = int(options.get("steps", 300))
    overrides = ["tracking=none", f"trl.max_steps={steps}", f"trl.eval_steps={max(1, steps // 3)}", "data.gold=null"]
    if "model" in options:
        overrides += ["model=local", f"model.path={options['model']}", "trl.learning_rate=1e-5"]
    if "train" in options:
        overrides += ["data=jsonl", f"data.train={options['train']}", f"data.eval={options.get('eval', 'null')}"]
    overrides += ["trl.per_device_train_batch_size=8", f"trl.max_length={options.get('max_length', 512)}"]
    result = train(compose(overrides), Path(tempfile.mkdtemp()) / "run")
    total, probe = result.seconds["train"], sum(spent)
    return [
        (f"run of {steps} steps of 8, seconds without the probe", total - probe),
        ("probe, seconds", probe),
        ("probe, share of the run in %", 100 * probe / (total - probe)),
    ]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
