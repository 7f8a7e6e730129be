"""Training through dpo_kit is training with TRL: same arguments, same rows, same losses (CONTRACT: relative 1e-6)."""

import pytest
from datasets import Dataset
from hydra.utils import get_class
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_kit.config.compose import check, compose
from dpo_kit.run.history import read_metrics
from dpo_kit.toy import MODEL, TRAIN
from dpo_kit.trainer.rows import prepare_data
from dpo_kit.training import train

COMMON = {
    "max_steps": 6,
    "logging_steps": 1,
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 8,
    "max_length": 128,
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A few embedded pairs as a user's own file."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(TRAIN.read_text().splitlines(keepends=True)[:80]))
    return file


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("dpo", {}),
        ("ipo", {"loss_type": ["ipo"]}),
        ("kto", {"dataloader_drop_last": True}),
        ("orpo", {}),
        ("cpo", {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
        ("simpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0, "beta": 2.0}),
    ],
)
@pytest.mark.parametrize(
    ("tuning", "fast", "relative"),
    [
        ("full", False, 1e-6),
        ("lora", True, 1e-5),
        pytest.param("full", True, 1e-5, marks=pytest.mark.slow),
        pytest.param("lora", False, 1e-6, marks=pytest.mark.slow),
    ],
)
def test_losses_equal_those_of_plain_trl(method, own, tuning, fast, relative, pairs, tmp_path):
    cfg = compose(
        [
            f"method={method}",
            f"model.tuning={tuning}",
            "data=jsonl",
            f"data.train={pairs}",
            "tracking=none",
            "callbacks=none",
            # which tokens dropout drops depends on how a batch is laid out
            *(["model.lora.lora_dropout=0"] if tuning == "lora" else []),
            f"speed.reference_store={fast}",
            f"speed.share_prefix={fast}",
            *(f"trl.{key}={value}" for key, value in COMMON.items()),
            "trl.save_strategy=no",
        ]
    )
    train(cfg, tmp_path / "ours")
    ours = [row["loss"] for row in read_metrics(tmp_path / "ours" / "metrics.jsonl") if "loss" in row]
    theirs = _losses_of_plain_trl(cfg, own, tuning, tmp_path / "theirs")
    assert ours == pytest.approx(theirs, rel=relative)
    assert len(theirs) == COMMON["max_steps"] and theirs[0] != theirs[-1]


def _losses_of_plain_trl(cfg, own, tuning, folder):
    """What a script of one's own would do on the same rows; only the class paths and the rows come from dpo_kit."""
    settings = check(cfg)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    data = prepare_data(settings, tokenizer)
    args = get_class(settings.method.config)(
        output_dir=str(folder / "trl"),
        report_to="none",
        seed=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        warmup_steps=0.1,
        save_strategy="no",
        logging_nan_inf_filter=False,
        **(COMMON | own),
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0, target_modules="all-linear")
    columns = ("prompt", "completion", "label") if settings.method.rows == "unary" else ("prompt", "chosen", "rejected")
    trainer = get_class(settings.method.trainer)(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
        args=args,
        train_dataset=Dataset.from_list([{name: row[name] for name in columns} for row in data.train]),
        processing_class=tokenizer,
        peft_config=lora if tuning == "lora" else None,
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
