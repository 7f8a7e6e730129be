"""Whether a run surely finds room in memory, from sizes alone; memory.py counts what is not sure."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from dpo_kit.config.settings import Settings
from dpo_kit.model.batches import mlp_width
from dpo_kit.model.hardware import has_accelerator
from dpo_kit.model.load import read_config
from dpo_kit.model.scoring import TOKENS_PER_BATCH

ROOM = 0.8  # of the free memory: estimates are up to a fifth too low


def surely_fits(settings: Settings, args: Any) -> bool:
    """Whether a run with the TRL arguments `args` needs so little that nobody has to count: generously, from sizes."""
    text = read_config(settings.model).get_text_config()
    length = args.max_length or getattr(text, "max_position_embeddings", 2048)
    tokens = max(2 * args.per_device_train_batch_size * length, TOKENS_PER_BATCH)
    width = (
        40 * text.hidden_size + 10 * mlp_width(text) + 4 * (getattr(text, "num_attention_heads", None) or 1) * length
    )
    weights = text.num_hidden_layers * text.hidden_size * (4 * text.hidden_size + 3 * mlp_width(text))
    weights += 2 * text.vocab_size * text.hidden_size
    activations = 8 * tokens * (text.num_hidden_layers * width + 8 * text.vocab_size)
    return activations + 40 * weights <= ROOM * free_memory()


def free_memory() -> int:
    """Bytes that are free on the accelerator, or on this machine where there is none."""
    return torch.cuda.mem_get_info()[0] if has_accelerator() else psutil.virtual_memory().available
