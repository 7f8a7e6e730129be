"""Rows that TRL has tokenised once are not tokenised again by later runs on the same rows, whatever their arguments."""

from __future__ import annotations

import copy
import functools
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers
import trl
from datasets import Dataset, is_caching_enabled, load_from_disk
from datasets.fingerprint import Hasher
from pyarrow import ArrowException

from dpo_kit.errors import DataError
from dpo_kit.processes import world_size

log = logging.getLogger(__name__)
Base: Any = object  # in use, a trainer follows in the method resolution order


class CachedTokens(Base):
    """Mixin before a TRL trainer: what its `_prepare_dataset` maps is kept under `root`, beside the rows.

    datasets keeps the result of a map next to the file of its rows, addressed by function and arguments, and nowhere
    for rows in memory. A cache that cannot be read or written is done without; DataError where there are several
    processes.
    """

    root: Path

    def _prepare_dataset(self, dataset: Dataset, tokenizer: Any, args: Any, name: str) -> Dataset:
        prepare = functools.partial(super()._prepare_dataset, processing_class=tokenizer, dataset_name=name)
        if not is_caching_enabled():
            return prepare(dataset, args=args)
        folder = self.root / Hasher.hash([trl.__version__, transformers.__version__, dataset._fingerprint])
        try:
            return prepare(_on_disk(dataset, folder), args=_without_limit(args))
        except (OSError, ArrowException) as error:
            if world_size() > 1:  # processes wait for each other in there: one alone must not begin again
                raise DataError(f"tokenised rows cannot be kept in {folder} ({error}): delete it") from error
            log.info("tokenised rows are not kept in %s: %s", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
            return prepare(dataset, args=args)


def _without_limit(args: Any) -> Any:
    """`args` for a preparation that drops no row: those without room for an answer are gone already, and the address
    of TRL's filter would hold every argument of the run.
    """
    args = copy.copy(args)
    args.max_length = None
    return args


def _on_disk(dataset: Dataset, folder: Path) -> Dataset:
    """`dataset`, read from `folder`, where it is written whole or not at all."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            dataset.save_to_disk(aside)
            _claim(Path(aside), folder)
    return load_from_disk(str(folder))


def _claim(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder`, which another process may have written in the meantime."""
    try:
        aside.replace(folder)
    except OSError:
        if not folder.exists():
            raise


def with_token_cache(trainer: type, root: Path) -> type:
    """The class `trainer` with its tokens kept under `root`; as it is where it tokenises by a method of its own, which
    datasets cannot address (ORPO, CPO).
    """
    return (
        type(trainer.__name__, (CachedTokens, trainer), {"root": root})
        if hasattr(trainer, "_prepare_dataset")
        else trainer
    )
