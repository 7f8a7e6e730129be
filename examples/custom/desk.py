"""A method, two measures and a callback of your own, from a folder of your own.

    PYTHONPATH=examples/custom python -m dpo_kit --config-dir examples/custom method=ld_dpo callbacks=mine

`method/ld_dpo.yaml` is the method, `callbacks/mine.yaml` names what stands here. The run stops early, when the policy
has drifted 2.5 nats from the reference; the measures stand in its table, its metrics.jsonl and result.json, and in
wandb, under custom/. Expect, at the end:

    steps               60 ± 30
    held-out accuracy   0.883 ± 0.045
    beats_rude          0.959 ± 0.030
    rude                0.083 ± 0.060
"""

from transformers import TrainerCallback

from dpo_kit.toy.domain import RUDE


def beats_rude(rows, scores):
    """Of the held-out pairs in which only the rejected answer is rude: how often the policy tells which it is."""
    margins = scores.logratio_chosen - scores.logratio_rejected
    told = [
        0.5 * ((margin > 0) + (margin >= 0))
        for row, margin in zip(rows, margins.tolist(), strict=True)
        if is_rude(row["rejected"][-1]["content"]) and not is_rude(row["chosen"][-1]["content"])
    ]
    return sum(told) / len(told)


def share_of_rude(prompts, answers):
    """How many of the policy's fresh answers are rude."""
    return sum(map(is_rude, answers)) / len(answers)


def is_rude(answer):
    return any(sentence in answer for sentence in RUDE)


class StopAtDrift(TrainerCallback):
    """Stops the run once the policy has drifted `nats` from the reference (forward KL, per answer)."""

    def __init__(self, nats):
        self.nats = nats

    def on_log(self, args, state, control, logs=None, **kwargs):
        if (logs or {}).get("probe/kl_forward_rb_nats", 0) > self.nats:
            control.should_training_stop = True
