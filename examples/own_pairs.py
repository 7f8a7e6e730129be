"""Your own pairs and your own model, from a file to a verdict: check, train, evaluate.

    python examples/own_pairs.py

It writes a small file of pairs, in the words of whoever collected them, and a model folder, then types the commands
that follow. Expect, at the end:

    pairs to train on   1280 ± 0
    held-out accuracy   0.919 ± 0.050
    win rate            0.89 ± 0.10

The learning rate suits a model of half a million parameters; leave it out with one of billions.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_kit.toy import MODEL, TRAIN

FOLDER = Path("outputs/own")
MINE = (
    f"model=local model.path={FOLDER}/model data=jsonl data.train={FOLDER}/pairs.jsonl "
    "'data.columns={prompt: question, chosen: better, rejected: worse}'"
)
COMMANDS = (
    f"python -m dpo_kit data {MINE} out={FOLDER}/report",
    f"python -m dpo_kit {MINE} data.holdout=0.2 trl.learning_rate=2e-4 allow_learning_rate=true tracking=none "
    f"hydra.run.dir={FOLDER}/run",
    f"python -m dpo_kit evaluate run={FOLDER}/run judge=gold judge.module=dpo_kit.toy win_rate.limit=40",
)


def main():
    write_model(FOLDER / "model")
    write_pairs(FOLDER / "pairs.jsonl", 1600)
    for command in COMMANDS:
        print(f"\n$ {command}", flush=True)
        subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    report = json.loads((FOLDER / "run" / "data_report.json").read_text())
    found = json.loads((FOLDER / "run" / "evaluation" / "result.json").read_text())
    print(f"\npairs to train on   {report['rows']['train']}")
    print(f"held-out accuracy   {found['accuracy']:.3f}")
    print(f"win rate            {found['win_rate']:.3f}")


def write_model(folder):
    """Any folder with safetensors weights and a tokenizer does."""
    AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)


def write_pairs(file, count):
    """Chat messages under other names, one pair a line: {"question": [turns], "better": [turn], "worse": [turn]}."""
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()[:count]]
    own = [{"question": row["prompt"], "better": row["chosen"], "worse": row["rejected"]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in own))


if __name__ == "__main__":
    main()
