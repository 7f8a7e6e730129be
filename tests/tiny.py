"""Tiny random models, tokenizers, rows and TRL trainers for the tests of measuring."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from dpo_kit.trainer.build import with_mixins

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "runs", "sleeps"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "kto": (KTOTrainer, KTOConfig, {}),
    "orpo": (ORPOTrainer, ORPOConfig, {}),
    "cpo": (CPOTrainer, CPOConfig, {}),
    "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}),
}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def tokenizer(words: list[str] = [*WORDS, "user", "assistant"]) -> PreTrainedTokenizerFast:  # noqa: B006
    """One token per word; <pad> is 0, <eos> 1."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


def model(vocabulary: int = 14, seed: int = 0, scale: float = 0.3, dropout: float = 0.0) -> LlamaForCausalLM:
    """A random Llama of two layers whose next-token distributions are far from uniform."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=scale,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def saved_model(path: Path, **options: Any) -> str:
    """The folder of a random model and its tokenizer, which TRL loads its own reference from."""
    model(**options).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def pairs(count: int, prompts: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Random pairs of text rows, over `prompts` distinct prompts."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(prompts or count)]
    return [
        {
            "pair_id": f"p{index}",
            "prompt_id": f"x{index % len(texts)}",
            "prompt": texts[index % len(texts)],
            "chosen": " " + " ".join(rng.choices(WORDS, k=rng.randint(1, 6))),
            "rejected": " " + " ".join(rng.choices(WORDS, k=rng.randint(1, 6))),
        }
        for index in range(count)
    ]


def unary(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Random completions with alternating labels."""
    return [
        {
            "pair_id": row["pair_id"],
            "prompt_id": row["prompt_id"],
            "prompt": row["prompt"],
            "completion": row["chosen"],
            "label": index % 2 == 0,
        }
        for index, row in enumerate(pairs(count, seed=seed))
    ]


def trainer(
    kind: str,
    folder: str,
    output: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    mixins: Sequence[type] = (),
    root: Path | None = None,
    **options: Any,
) -> Any:
    """A plain TRL trainer on a tiny model; `options` are arguments of its config or of the trainer; `mixins`
    stand before its class, with a reference store under `root`."""
    train_class, config_class, defaults = TRAINERS[kind]
    given = {key: options.pop(key) for key in ("peft_config", "ref_model", "model", "eval_dataset") if key in options}
    rows = rows or (unary(16) if kind == "kto" else pairs(16))
    columns = [key for key in rows[0] if not key.endswith("_id")]
    data = Dataset.from_list([{key: row[key] for key in columns} for row in rows])
    arguments = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 32,
        "max_steps": 4,
        "max_length": 32,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        **defaults,
        **options,
    }
    if given.get("peft_config") is not None:
        given["peft_config"] = replace(given["peft_config"])  # PEFT writes the model's path into it
    given.setdefault("model", LlamaForCausalLM.from_pretrained(folder))
    given.setdefault("eval_dataset", data)
    train_class = with_mixins(train_class, *mixins, root=root)
    return train_class(args=config_class(**arguments), train_dataset=data, processing_class=tokenizer(), **given)
