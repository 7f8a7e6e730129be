"""Rows that were tokenised once are read by later runs, whatever their arguments; never where anything differs."""

import functools
from pathlib import Path
from typing import Any

import datasets
import pytest
from dpo_kit.token_cache import with_token_cache

from dpo_kit import token_cache
from dpo_kit.reference import with_store
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What datasets maps from here on. (A watched tokenizer would have another address.)"""
    seen: list[Any] = []
    original = datasets.Dataset._map_single

    @functools.wraps(original)
    def watched(*given: Any, **options: Any) -> Any:
        seen.append(options.get("desc"))
        return original(*given, **options)

    monkeypatch.setattr(datasets.Dataset, "_map_single", staticmethod(watched))
    return seen


def rows_of(trainer: Any) -> list[dict[str, Any]]:
    """What a trainer reads of its rows: all but the texts, to which TRL adds an end."""
    texts = {"prompt", "chosen", "rejected", "completion"}
    return list(trainer.train_dataset.remove_columns(texts & {*trainer.train_dataset.column_names}))


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_run_with_other_arguments_tokenises_nothing(
    kind: str, folder: str, tmp_path: Path, tokenized: list[Any]
) -> None:
    plain = tiny.trainer(kind, folder, tmp_path)
    assert tokenized
    first = tiny.trainer(kind, folder, tmp_path, wrap=lambda cls: with_token_cache(cls, tmp_path / "tokens"))
    files = sorted((tmp_path / "tokens").rglob("*"))
    tokenized.clear()
    other = {"beta": 0.5, "learning_rate": 1e-5, "max_length": 64, "seed": 3, "output_dir": str(tmp_path / "other")}
    again = tiny.trainer(kind, folder, tmp_path, wrap=lambda cls: with_token_cache(cls, tmp_path / "tokens"), **other)
    assert not tokenized
    assert rows_of(plain) == rows_of(first) == rows_of(again)
    assert sorted((tmp_path / "tokens").rglob("*")) == files


def test_another_batch_size_of_kto_makes_its_mismatched_pairs_anew(folder: str, tmp_path: Path) -> None:
    def kl_answers(size: int, **wrap: Any) -> list[Any]:
        return tiny.trainer("kto", folder, tmp_path, per_device_train_batch_size=size, **wrap).train_dataset[
            "KL_completion_ids"
        ][:]

    cached: dict[str, Any] = {"wrap": lambda cls: with_token_cache(cls, tmp_path / "tokens")}
    assert kl_answers(4, **cached) == kl_answers(4)
    assert kl_answers(2, **cached) == kl_answers(2) != kl_answers(4)


def test_other_rows_and_another_template_are_tokenised(
    folder: str, tmp_path: Path, tokenized: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {name: [{"role": "user", "content": row[name]}] for name in row if "_" not in name} for row in tiny.pairs(8)
    ]

    def cached(rows: list[dict[str, Any]]) -> Any:
        tokenized.clear()
        return tiny.trainer("dpo", folder, tmp_path, rows=rows, wrap=lambda cls: with_token_cache(cls, tmp_path / "t"))

    first = rows_of(cached(rows))
    cached(rows[:4])
    assert tokenized
    monkeypatch.setattr(tiny, "TEMPLATE", tiny.TEMPLATE.replace("<eos>", "<eos><eos>"))
    assert rows_of(cached(rows)) != first
    assert tokenized


@pytest.mark.parametrize("fault", ["cut", "not a folder", "switched off"])
def test_without_a_usable_cache_the_rows_are_the_same(
    fault: str, folder: str, tmp_path: Path, tokenized: list[Any], request: pytest.FixtureRequest
) -> None:
    root = tmp_path / "tokens"
    wrap = lambda cls: with_token_cache(cls, root)  # noqa: E731
    expected = rows_of(tiny.trainer("dpo", folder, tmp_path))
    if fault == "cut":
        tiny.trainer("dpo", folder, tmp_path, wrap=wrap)
        for file in root.rglob("*.arrow"):
            file.write_bytes(file.read_bytes()[:-100])
    elif fault == "not a folder":
        root.write_text("in the way")
    else:
        datasets.disable_caching()
        request.addfinalizer(datasets.enable_caching)
    tokenized.clear()
    assert rows_of(tiny.trainer("dpo", folder, tmp_path, wrap=wrap)) == expected
    assert tokenized
    assert fault != "switched off" or not root.exists()


def test_trainers_that_tokenise_by_a_method_are_left_as_they_are() -> None:
    assert with_token_cache(tiny.ORPOTrainer, Path()) is tiny.ORPOTrainer


def test_of_several_processes_none_goes_a_way_of_its_own(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "world_size", lambda: 2)
    tiny.trainer("dpo", folder, tmp_path, wrap=lambda cls: with_token_cache(cls, tmp_path / "tokens"))
    assert not (tmp_path / "tokens").exists()


def test_texts_are_not_kept_and_a_reference_store_beside_has_a_folder_of_its_own(folder: str, tmp_path: Path) -> None:
    def wrap(cls: type) -> type:
        return with_store(with_token_cache(cls, tmp_path / "tokens"), tmp_path / "reference")

    trainer = tiny.trainer("dpo", folder, tmp_path, wrap=wrap, precompute_ref_log_probs=True)
    trainer.get_train_dataloader()
    assert "ref_chosen_logps" in trainer.train_dataset.column_names and [*(tmp_path / "reference").rglob("*.*")]
    (kept,) = (tmp_path / "tokens").iterdir()
    assert datasets.load_from_disk(str(kept)).column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert not [*(tmp_path / "reference").rglob("*.arrow")]
