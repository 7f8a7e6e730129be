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
from datasets import Dataset, concatenate_datasets, is_caching_enabled, load_from_disk
from datasets.fingerprint import Hasher
from pyarrow import ArrowException

from dpo_kit.processes import world_size

log = logging.getLogger(__name__)
Base: Any = object  # in use, a trainer follows in the method resolution order


class CachedTokens(Base):
    """Mixin before a TRL trainer: the columns that its `_prepare_dataset` adds are kept under `tokens`, without texts.

    A cache that cannot be read or written is done without. So it is where there are several processes, which wait for
    each other in there.
    """

    tokens: Path

    def _prepare_dataset(self, dataset: Dataset, tokenizer: Any, args: Any, name: str) -> Dataset:
        prepare = functools.partial(super()._prepare_dataset, dataset, tokenizer, dataset_name=name)
        if not is_caching_enabled() or world_size() > 1:
            return prepare(args=args)
        kl_batch = args.per_device_train_batch_size if getattr(self, "calculate_KL", False) else None
        address = [trl.__version__, transformers.__version__, dataset._fingerprint, tokenizer, kl_batch]
        folder = self.tokens / Hasher.hash(address)
        added = _read(folder)
        if added is None:
            prepared = prepare(args=_without_limit(args))
            if len(prepared) != len(dataset):
                return prepared
            added = prepared.select_columns([c for c in prepared.column_names if c not in dataset.column_names])
            _write(added, folder)
        return concatenate_datasets([dataset, added], axis=1)


def _without_limit(args: Any) -> Any:
    """`args` for a preparation that drops no row, whatever `max_length` is: those without room for an answer are gone
    already.
    """
    args = copy.copy(args)
    args.max_length = None
    return args


def _read(folder: Path) -> Dataset | None:
    """The columns kept in `folder`; None where there are none that can be read."""
    if not folder.exists():
        return None
    try:
        return load_from_disk(str(folder), keep_in_memory=True)  # type: ignore[return-value]
    except (OSError, ArrowException) as error:
        log.info("tokenised rows in %s cannot be read: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _write(columns: Dataset, folder: Path) -> None:
    """Write `columns` to `folder`, whole or not at all; another process may have done so in the meantime."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            columns.save_to_disk(Path(aside) / folder.name)
            (Path(aside) / folder.name).replace(folder)
    except OSError as error:
        log.info("tokenised rows are not kept in %s: %s", folder, error)


def with_token_cache(trainer: type, root: Path) -> type:
    """The class `trainer` with its tokens kept under `root`; as it is where it tokenises by a method of its own
    (ORPO, CPO).
    """
    return (
        type(trainer.__name__, (CachedTokens, trainer), {"tokens": root})
        if hasattr(trainer, "_prepare_dataset")
        else trainer
    )
