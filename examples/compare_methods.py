"""Several methods, full and LoRA, on one model and one data set: margin, accuracy, KL and seconds side by side.

    python examples/compare_methods.py                       the embedded model and pairs
    python examples/compare_methods.py model=DIR train=pairs.jsonl eval=held_out.jsonl steps=60 full=1e-4 lora=1e-3

Options: methods=dpo,ipo,… tunings=full,lora steps=60 full=RATE lora=RATE out=FOLDER, and any override of dpo_kit.
Every number is measured on the same held-out pairs against the same step-0 model, so the rows compare.
"""

import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpo_kit import compose, train

OWN = {
    "methods": "dpo,ipo,kto,orpo,cpo,simpo",
    "tunings": "full,lora",
    "steps": "60",
    "full": "",
    "lora": "",
    "out": "",
    "model": "",
    "train": "",
    "eval": "null",
}


def main(arguments):
    given = dict(argument.split("=", 1) for argument in arguments)
    options = OWN | {key: value for key, value in given.items() if key in OWN}
    further = [f"{key}={value}" for key, value in given.items() if key not in OWN]
    folder = Path(options["out"] or tempfile.mkdtemp())
    table = Table("method", "tuning", "margin, nats", "accuracy", "KL forward", "KL reverse", "seconds")
    for method in options["methods"].split(","):
        for tuning in options["tunings"].split(","):
            result = train(compose(overrides(options, method, tuning) + further), folder / f"{method}-{tuning}")
            table.add_row(method, tuning, *cells(result))
    Console(width=120).print(table)


def overrides(options, method, tuning):
    chosen = [f"method={method}", f"model.tuning={tuning}", f"trl.max_steps={options['steps']}", "tracking=none"]
    if options["model"]:
        chosen += ["model=local", f"model.path={options['model']}"]
    if options["train"]:
        chosen += ["data=jsonl", f"data.train={options['train']}", f"data.eval={options['eval']}"]
    if options[tuning]:
        chosen += [f"trl.learning_rate={options[tuning]}", "allow_learning_rate=true"]
    return chosen


def cells(result):
    final = result.final

    def interval(key):
        return f"{final[key]:.2f} [{final[key + '_low']:.2f}, {final[key + '_high']:.2f}]"

    def error(key):
        return f"{final[key]:.2f} ± {1.96 * final[key + '_se']:.2f}"

    return (
        interval("probe/margin_nats"),
        interval("probe/accuracy"),
        error("probe/kl_forward_rb_nats"),
        error("probe/kl_reverse_rb_nats"),
        f"{result.seconds['train']:.0f}",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
