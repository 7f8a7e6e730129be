"""KTO from thumbs up and down, of which there are five times as many up as down.

    python examples/kto_thumbs.py

A row is one answer with its thumb: {"prompt": …, "completion": …, "label": true}. No pairs are needed, and the two
classes may be of any size: left to itself, dpo_kit gives thumbs up the weight with which both classes count the same.
Expect:

    thumbs up              1990 ± 0
    thumbs down            398 ± 0
    weight of thumbs up    0.200 ± 0.001
    weight of thumbs down  1.000 ± 0
    held-out AUC           0.792 ± 0.050
    gold reward            1.95 ± 0.25
"""

import json
from pathlib import Path

from dpo_kit import compose, train
from dpo_kit.toy import EVAL, TRAIN

FOLDER = Path("outputs/thumbs")


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    thumbs = write_thumbs(TRAIN, FOLDER / "train.jsonl")
    write_thumbs(EVAL, FOLDER / "eval.jsonl")
    data = [f"data.train={FOLDER / 'train.jsonl'}", f"data.eval={FOLDER / 'eval.jsonl'}"]
    result = train(compose(["method=kto", *data, "tracking=none"]))
    weights = json.loads((Path(result.run_dir) / "trl_config.json").read_text())
    print(f"thumbs up              {sum(row['label'] for row in thumbs)}")
    print(f"thumbs down            {sum(not row['label'] for row in thumbs)}")
    print(f"weight of thumbs up    {weights['desirable_weight']:.3f}")
    print(f"weight of thumbs down  {weights['undesirable_weight']:.3f}")
    print(f"held-out AUC           {result.final['probe/auc']:.3f}")
    print(f"gold reward            {result.final['gold/reward']:.3f}")


def write_thumbs(pairs, file):
    """One thumb for each pair: five up for the chosen answer, then one down for the rejected."""
    rows = []
    for number, line in enumerate(pairs.read_text().splitlines()):
        up, pair = number % 6 != 0, json.loads(line)
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen" if up else "rejected"], "label": up})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


if __name__ == "__main__":
    main()
