"""Token ids against those of TRL's own trainers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_kit.model.chats import prompt_of
from dpo_kit.model.tokens import Truncation, common_prefix_length, encode_prompts, encode_rows
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved_model(tmp_path_factory.mktemp("tokens"))


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with BOS whose tokens merge across the end of a prompt ("run" + "ning")."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    words = ["running sleeping"] * 20 + ["runner"]
    trainer = trainers.BpeTrainer(special_tokens=["<pad>", "<eos>", "<bos>"], vocab_size=300)
    core.train_from_iterator(words, trainer)
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        bos_token="<bos>",
        chat_template=tiny.TEMPLATE,
    )


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {key: [{"role": role, "content": row[key]}] for key, role in roles.items()}


TEXT = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in tiny.pairs(6)]
MERGING = [
    {"prompt": "sleep run", "chosen": "ning fast", "rejected": " slowly<eos>"},
    {"prompt": "run", "chosen": "ner", "rejected": "ning"},
]
CASES = {
    "text": (tiny.tokenizer, TEXT),
    "chat": (tiny.tokenizer, [as_chat(row) for row in TEXT]),
    "merging text with BOS": (merging_tokenizer, MERGING),
    "merging chat": (merging_tokenizer, [as_chat(row) for row in MERGING]),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_that_dpo_trains_on(case: str) -> None:
    make, rows = CASES[case]
    tokenizer = make()
    # TRL's preparation reads nothing of the trainer but its tokenizer
    trainer = type("Prepared", (tiny.DPOTrainer,), {"__init__": lambda self: None})()
    trainer._tokenizer = tokenizer
    arguments = type("Arguments", (), {"dataset_num_proc": None, "max_length": None, "truncation_mode": "keep_start"})
    expected = trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, arguments, "train")
    encoded = encode_rows(
        tokenizer, [row["prompt"] for row in rows], [[row["chosen"], row["rejected"]] for row in rows]
    )
    assert encoded == [(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in expected]


def test_ids_are_those_of_plain_trainers_where_they_agree(folder: str, tmp_path: Path) -> None:
    """DPO's and KTO's columns always; ORPO's and CPO's on text that is split as its parts are."""
    rows = tiny.pairs(4)
    made: dict[str, list[Any]] = {}
    for kind in tiny.TRAINERS:
        data = tiny.unary(4) if kind == "kto" else rows
        made[kind] = list(tiny.trainer(kind, folder, tmp_path, rows=data, max_length=64).train_dataset)
    for index, row in enumerate(rows):
        answers = [row["chosen"], row["rejected"]]
        ((prompt, (chosen, rejected)),) = encode_rows(tiny.tokenizer(), [row["prompt"]], [answers])
        dpo, kto = made["dpo"][index], made["kto"][index]
        assert (dpo["prompt_ids"], dpo["chosen_ids"], dpo["rejected_ids"]) == (prompt, chosen, rejected)
        assert (kto["prompt_ids"], kto["completion_ids"]) == (prompt, chosen)
        for kind in ("orpo", "cpo", "simpo"):
            assert made[kind][index]["chosen_input_ids"] == prompt + chosen
            assert [each for each in made[kind][index]["rejected_labels"] if each != -100] == rejected


def test_tokens_that_merge_across_the_boundary_shorten_the_prompt() -> None:
    tokenizer = merging_tokenizer()
    ((prompt, (merged,)),) = encode_rows(tokenizer, ["sleep run"], [["ning"]])
    assert len(prompt) < len(tokenizer("sleep run")["input_ids"])
    assert prompt + merged == tokenizer("sleep running<eos>")["input_ids"]


def test_eos_is_appended_once() -> None:
    tokenizer = tiny.tokenizer()
    ((_, (without, with_eos)),) = encode_rows(tokenizer, ["red"], [[" cat", " cat<eos>"]])
    assert without == with_eos == [*tokenizer(" cat")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("max_length", [None, 3, 6, 9])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_is_the_collators(mode: str, max_length: int | None) -> None:
    prompt, completion = [5, 6, 7, 8], [9, 10, 11]
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)
    batch = collator([{"prompt_ids": prompt, "chosen_ids": completion, "rejected_ids": completion}])
    mask = batch["completion_mask"][0].bool()
    expected = (batch["input_ids"][0][~mask].tolist(), batch["input_ids"][0][mask].tolist())
    truncation = Truncation(max_length, mode)
    assert truncation.cut(prompt, completion) == expected
    lengths = tuple(map(len, truncation.cut(range(len(prompt)), range(len(completion)))))
    assert lengths == tuple(map(len, expected))


def test_a_trainer_without_a_truncation_mode_keeps_the_start() -> None:
    for given in ({"max_length": 4}, {"max_length": 4, "truncation_mode": None}):
        assert Truncation.of(given) == Truncation.of(SimpleNamespace(**given)) == Truncation(4, "keep_start")
    assert Truncation.of({"max_length": 4, "truncation_mode": "keep_end"}) == Truncation(4, "keep_end")


def test_a_chat_prompt_ends_in_the_generation_prompt() -> None:
    tokenizer = tiny.tokenizer()
    (ids,) = encode_prompts(tokenizer, [[{"role": "user", "content": "red"}]])
    assert ids == tokenizer("user red <eos> assistant")["input_ids"]


def test_template_arguments_reach_the_template() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ prefix }} " + tiny.TEMPLATE
    row = {"prompt": [{"role": "user", "content": "red"}], "chat_template_kwargs": {"prefix": "blue"}}
    (ids,) = encode_prompts(tokenizer, [prompt_of(row)])
    assert ids[0] == tokenizer("blue")["input_ids"][0]


def test_common_prefix_stops_at_the_first_difference() -> None:
    assert common_prefix_length([1, 2, 3], [1, 2, 4, 3]) == 2
    assert common_prefix_length([1, 2], [1, 2, 3]) == 2
    assert common_prefix_length([], [1]) == 0


def test_no_rows_encode_to_none() -> None:
    assert encode_rows(tiny.tokenizer(), [], []) == []
