"""Scores of a reward model: a sequence-classification checkpoint with one output."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dpo_kit.config.settings import RewardModelJudge
from dpo_kit.errors import ModelError
from dpo_kit.model.batches import pad_batch, pad_token_id
from dpo_kit.model.chats import as_messages
from dpo_kit.model.hardware import has_accelerator, training_precision
from dpo_kit.model.tokens import encode_chats
from dpo_kit.model.turns import neutralised


class RewardModel:
    """The checkpoint at `settings.path`: safetensors only, no code from its repository. Raises ModelError."""

    def __init__(self, settings: RewardModelJudge) -> None:
        self.settings = settings
        where: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": False}
        how = {"dtype": getattr(torch, training_precision()), "use_safetensors": True, "output_loading_info": True}
        try:
            tokenizer = AutoTokenizer.from_pretrained(settings.path, **where)
            model, found = AutoModelForSequenceClassification.from_pretrained(settings.path, **where, **how)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"judge.path={settings.path} cannot be loaded: {reason}") from error
        self.tokenizer = neutralised(tokenizer)
        if found["missing_keys"]:  # transformers fills them with random numbers and goes on
            raise ModelError(
                f"judge.path={settings.path} is no reward model: it has no weights for "
                f"{', '.join(sorted(found['missing_keys']))}; take a sequence-classification checkpoint"
            )
        if model.config.num_labels != 1:
            raise ModelError(
                f"judge.path={settings.path} has {model.config.num_labels} outputs; a reward model has one: take a "
                "checkpoint with num_labels=1"
            )
        if model.config.pad_token_id is None:  # without it the model cannot tell where the rows of a batch end
            model.config.pad_token_id = pad_token_id(self.tokenizer)
        self.model = model.eval().to("cuda" if has_accelerator() else "cpu")

    @torch.no_grad()
    def score(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        """The model's output for each answer to its prompt; both are cut at `max_length` tokens."""
        texts = [self._encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        ids, mask = pad_batch(texts, self.model.config.pad_token_id, self.model.device, "right")
        return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()

    def _encode(self, prompt: Any, answer: str) -> list[int]:
        if isinstance(prompt, str) and self.tokenizer.chat_template is None:
            ids = self.tokenizer(prompt + answer)["input_ids"]
        else:
            (ids,) = encode_chats(self.tokenizer, [[*as_messages(prompt), {"role": "assistant", "content": answer}]])
        return ids[: self.settings.max_length]
