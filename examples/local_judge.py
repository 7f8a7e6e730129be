"""Evaluate with a judge of your own that runs here: a reward model, trained on the same pairs by TRL.

    python examples/local_judge.py

It tunes a policy, trains a reward model on the embedded pairs, asks it about 100 prompts in both orders, and then the
known truth about the same answers. Expect both to call the policy better:

    win rate by the reward model   0.72 ± 0.08
    win rate by the truth          0.80 ± 0.07

A reward model is a judge only as good as its pairs: `judge.path` takes any sequence-classification checkpoint with one
output. A language model judges through any server that speaks OpenAI's protocol (vLLM, Ollama, `transformers serve`),
with extra `openai`:

    python -m dpo_kit evaluate run=outputs/judged judge=llm judge.base_url=http://localhost:8000/v1 judge.model=NAME

(not run: needs a server).
"""

import json
import subprocess
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from dpo_kit.toy import MODEL, TRAIN

RUN, JUDGE = Path("outputs/judged"), Path("outputs/judge")


def main():
    train_judge()
    command(f"hydra.run.dir={RUN}", "tracking=none", "trl.max_steps=75")
    rate = evaluate(RUN / "by_model", "judge=reward_model", f"judge.path={JUDGE}")
    truth = evaluate(RUN / "by_truth", "judge=gold")
    print(f"win rate by the reward model   {rate:.3f}")
    print(f"win rate by the truth          {truth:.3f}")


def train_judge():
    """A reward model as TRL makes them: one output, trained to score the chosen answer above the rejected one."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=1, dtype="float32")
    model.config.pad_token_id = tokenizer.pad_token_id
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()]
    pairs = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in rows]
    args = RewardConfig(
        output_dir=str(JUDGE),
        learning_rate=5e-4,
        per_device_train_batch_size=16,
        num_train_epochs=2,
        gradient_checkpointing=False,
        bf16=False,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    trainer = RewardTrainer(model=model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(JUDGE))


def evaluate(folder, *judge):
    command("evaluate", f"run={RUN}", *judge, "parts=[win_rate]", "win_rate.limit=100", f"out={folder}")
    return json.loads((folder / "result.json").read_text())["win_rate"]


def command(*words):
    print("\n$ python -m dpo_kit", *words, flush=True)
    subprocess.run([sys.executable, "-m", "dpo_kit", *words], check=True)


if __name__ == "__main__":
    main()
