"""TRL's trainers on rows that are token ids, trained as they are by every method; and what TRL makes of texts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from trl.data_utils import maybe_apply_chat_template

from dpo_kit.model.tokens import encode_rows
from dpo_kit.trainer.rows import GivenTokens
from tests import styles, tiny

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"rain {n}"}],
        "chosen": [{"role": "assistant", "content": f"It falls {n}."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for n in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


def as_ids(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Text rows as TRL is given them by a run."""
    answers = [name for name in ("chosen", "rejected", "completion") if name in rows[0]]
    encoded = encode_rows(
        tiny.tokenizer(), [row["prompt"] for row in rows], [[row[n] for n in answers] for row in rows]
    )
    labels = [{"label": row["label"]} if "label" in row else {} for row in rows]
    return [
        {"prompt_ids": prompt} | {f"{name}_ids": own for name, own in zip(answers, ids, strict=True)} | label
        for (prompt, ids), label in zip(encoded, labels, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [32, 7])
@pytest.mark.parametrize("kind", tiny.TRAINERS)
def test_losses_are_those_of_the_plain_trainer_on_texts_that_it_reads_alike(
    kind: str, max_length: int, folder: str, tmp_path: Path
) -> None:
    rows = tiny.unary(16) if kind == "kto" else tiny.pairs(16)
    losses = []
    for given, mixins in ((rows, []), (as_ids(rows), [GivenTokens])):
        trainer = tiny.trainer(kind, folder, tmp_path, rows=given, mixins=mixins, max_length=max_length)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_what_each_trainer_holds_is_what_it_was_given(folder: str, tmp_path: Path) -> None:
    pairs, unary = as_ids(tiny.pairs(6)), as_ids(tiny.unary(6))
    for kind in ("dpo", "kto", "orpo", "cpo"):
        given = unary if kind == "kto" else pairs
        held = tiny.trainer(kind, folder, tmp_path, rows=given, mixins=[GivenTokens], max_length=64).train_dataset
        if kind in ("dpo", "kto"):
            assert [{name: row[name] for name in given[0]} for row in held] == given
        else:
            assert held["chosen_input_ids"][:] == [row["prompt_ids"] + row["chosen_ids"] for row in pairs]
            labels = [[token for token in row if token != -100] for row in held["rejected_labels"]]
            assert labels == [row["rejected_ids"] for row in pairs]


@pytest.mark.parametrize("size", [4, 2])
def test_kto_s_mismatched_pairs_are_trl_s(size: int, folder: str, tmp_path: Path) -> None:
    def answers(rows: list[dict[str, Any]], **mixins: Any) -> list[Any]:
        trainer = tiny.trainer("kto", folder, tmp_path, rows=rows, per_device_train_batch_size=size, **mixins)
        return trainer.train_dataset["KL_completion_ids"][:]

    assert answers(as_ids(tiny.unary(10)), mixins=[GivenTokens]) == answers(tiny.unary(10))


# --- what TRL does with texts: where one of these fails, TRL has mended it -------------------------------------------


def plain_ids(kind: str, tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """The sequence of the chosen answer that TRL's own trainer makes of `row`; it reads only its tokenizer."""
    made = type("Unbuilt", (tiny.TRAINERS[kind][0],), {"__init__": lambda self: None})()
    made._tokenizer = made.processing_class = tokenizer
    made.is_encoder_decoder, made.max_length, made.max_prompt_length = False, 1000, 1000
    if kind == "orpo":
        return made.tokenize_row(maybe_apply_chat_template(row, tokenizer))["chosen_input_ids"]
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    (ids,) = made._prepare_dataset(Dataset.from_list([row]), tokenizer, arguments, "train")
    return ids["prompt_ids"] + ids["chosen_ids"]


def our_ids(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    ((prompt, (answer,)),) = encode_rows(tokenizer, [row["prompt"]], [[row["chosen"]]])
    return prompt + answer


def test_orpo_ends_an_answer_twice_where_the_template_writes_more_after_its_end() -> None:
    """huggingface/trl#4481; its CPO has the same code."""
    tokenizer = styles.tokenizer("chatml")
    truth = tokenizer.apply_chat_template(ROWS[0]["prompt"] + ROWS[0]["chosen"])["input_ids"]
    assert plain_ids("orpo", tokenizer, ROWS[0]) == [*truth, tokenizer.eos_token_id]
    assert our_ids(tokenizer, ROWS[0]) == plain_ids("dpo", tokenizer, ROWS[0]) == truth


def test_orpo_begins_with_a_token_that_the_template_does_not_write() -> None:
    """huggingface/trl#1591; its CPO has the same code."""
    tokenizer = styles.tokenizer("phi3")
    truth = tokenizer.apply_chat_template(ROWS[0]["prompt"] + ROWS[0]["chosen"])["input_ids"]
    assert plain_ids("orpo", tokenizer, ROWS[0]) == [tokenizer.bos_token_id, *truth]
    assert our_ids(tokenizer, ROWS[0]) == plain_ids("dpo", tokenizer, ROWS[0]) == truth


def test_text_that_is_rendered_already_begins_and_ends_twice_in_trl() -> None:
    tokenizer = styles.tokenizer("llama3", adds="bos")
    messages = tokenizer.apply_chat_template(ROWS[0]["prompt"], add_generation_prompt=True, tokenize=False)
    row = {"prompt": messages, "chosen": "It falls.<|eot_id|>\n", "rejected": "No.<|eot_id|>\n"}
    truth = tokenizer(messages + row["chosen"], add_special_tokens=False)["input_ids"]
    assert plain_ids("dpo", tokenizer, row) == [tokenizer.bos_token_id, *truth, tokenizer.eos_token_id]
    assert our_ids(tokenizer, row) == truth


def test_the_end_that_a_tokenizer_adds_is_written_once_and_ends_no_prompt() -> None:
    tokenizer = styles.tokenizer("zephyr", adds="bos eos")
    row = {"prompt": "rain", "chosen": " falls", "rejected": " no"}
    truth = tokenizer("<s>rain falls</s>", add_special_tokens=False)["input_ids"]
    assert plain_ids("dpo", tokenizer, row) == [*truth, tokenizer.eos_token_id]
    assert our_ids(tokenizer, row) == truth


def test_orpo_passes_over_tools_that_dpo_reads() -> None:
    tokenizer, tool = styles.tokenizer("chatml"), {"name": "weather", "parameters": {}}
    row = ROWS[0] | {"tools": [tool]}
    truth = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tools=[tool])["input_ids"]
    assert plain_ids("dpo", tokenizer, row) == truth
    asked = [row["prompt"][0] | {"tools": [tool]}]
    assert our_ids(tokenizer, row | {"prompt": asked}) == truth
    assert "weather" not in tokenizer.decode(plain_ids("orpo", tokenizer, row))
