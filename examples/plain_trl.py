"""dpo_kit's callbacks in a plain TRL trainer, without its configs.

    python examples/plain_trl.py

Expect: held-out accuracy .5 and KL 0 at step 0, then accuracy above .6 with a KL of a few nats after 40 steps.
"""

import json
import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from dpo_kit import ImplicitReward, KLDrift, PairProbe, PreferenceMargin
from dpo_kit.toy import EVAL, MODEL, TRAIN  # any model and any preference pairs do


def read(file, count):
    rows = [json.loads(line) for line in file.read_text().splitlines()[:count]]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


def main():
    held_out = read(EVAL, 200)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(),
            beta=0.1,
            learning_rate=3e-4,
            per_device_train_batch_size=16,
            max_steps=40,
            eval_strategy="steps",
            eval_steps=20,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(read(TRAIN, 640)),
        eval_dataset=Dataset.from_list(held_out[:64]),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
    )
    probe = PairProbe(trainer, held_out, beta=trainer.args.beta, saturation="dpo")
    trainer.add_callback(PreferenceMargin(probe))
    trainer.add_callback(ImplicitReward(probe))
    trainer.add_callback(KLDrift(trainer, held_out[:64], reference=probe.reference))
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    keys = ("probe/accuracy", "probe/margin_nats", "probe/kl_forward_rb_nats", "probe/kl_reverse_rb_nats")
    for row in main():
        shown = {key: round(row[key], 3) for key in keys if key in row}
        if shown:
            print(f"step {row['step']}: {shown}")
