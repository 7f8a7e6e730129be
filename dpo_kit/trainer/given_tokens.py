"""TRL's trainers on rows that are token ids already: every method trains the same ones, and the probe reads them."""

from __future__ import annotations

from typing import Any

Base: Any = object  # in use, a trainer follows in the method resolution order


class GivenTokens(Base):
    """Mixin before a TRL trainer: `prompt_ids` and the ids of the answers are trained as they are.

    TRL's trainers read texts each in its own way: ORPO and CPO add a BOS and an EOS that the chat template does not
    write (huggingface/trl#1591, #4481) and leave out tools. Each has one of the two methods below.
    """

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """DPO and KTO: nothing is left to do but KTO's mismatched pairs, each answer with the prompt of the next row of
        its batch, as TRL makes them."""
        if not getattr(self, "calculate_KL", False) or "KL_completion_ids" in dataset.column_names:
            return dataset
        size, answers = args.per_device_train_batch_size, dataset["completion_ids"][:]
        batches = [answers[start : start + size] for start in range(0, len(answers), size)]
        return dataset.add_column("KL_completion_ids", [ids for batch in batches for ids in [batch[-1], *batch[:-1]]])

    def tokenize_row(self, row: Any, *_: Any) -> Any:
        """ORPO and CPO: whole sequences, cut at `max_length`, with labels where the answer is."""
        prompt = row["prompt_ids"]
        made = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for name in ("chosen", "rejected"):
            ids = (prompt + row[f"{name}_ids"])[: self.max_length]
            made[f"{name}_input_ids"], made[f"{name}_attention_mask"] = ids, [1] * len(ids)
            made[f"{name}_labels"] = ([-100] * len(prompt) + ids[len(prompt) :])[: self.max_length]
        return made
