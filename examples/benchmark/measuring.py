"""What share of a run measuring takes, for runs of few and of many steps.

    python examples/real_model/tune.py                # the model and the pairs that follow are its own
    python examples/benchmark/measuring.py [steps=12x8,50x8,200x2,1000x1] [folder=outputs/real_model] [out=FILE]

Each run is LoRA on a real model, STEPSxROWS: so many steps of so many pairs, everything else as it comes; what
measuring may take is `callbacks.budget=0.1` of the run. Printed is what the run chose and what it spent.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table


def main(arguments):
    options = {"steps": "12x8,50x8,200x2,1000x1", "folder": "outputs/real_model"}
    options |= dict(argument.split("=", 1) for argument in arguments)
    folder, measured = Path(options["folder"]), []
    for case in options["steps"].split(","):
        steps, rows = case.split("x")
        with tempfile.TemporaryDirectory() as place:
            words = (
                f"model=local model.path={folder}/model model.tuning=lora data=jsonl "
                f"data.train={folder}/stock/train.jsonl data.eval={folder}/eval.jsonl tracking=none "
                f"trl.max_steps={steps} trl.per_device_train_batch_size={rows} hydra.run.dir={place}/run"
            )
            subprocess.run([sys.executable, "-m", "dpo_kit", *words.split()], check=True)
            spent = json.loads(Path(place, "run", "result.json").read_text())["seconds"]
            chosen = json.loads(Path(place, "run", "manifest.json").read_text())["measuring"]
        measured.append({"steps": int(steps), "rows": int(rows), "seconds": spent, "measuring": chosen})
        if "out" in options:
            Path(options["out"]).write_text(json.dumps(measured, indent=2) + "\n")
    columns = ("steps", "pairs a step", "run, s", "measuring, s", "share", "evaluations", "pairs", "prompts", "tokens")
    table = Table(*columns, box=MARKDOWN)
    for run in measured:
        spent, chosen = run["seconds"], run["measuring"]
        table.add_row(
            *(str(run[name]) for name in ("steps", "rows")),
            f"{spent['run']:.0f}",
            f"{spent['measuring']:.0f}",
            f"{spent['measuring'] / spent['run']:.2f}",
            *(str(chosen[name]) for name in ("evaluations", "pairs", "prompts", "max_new_tokens")),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
