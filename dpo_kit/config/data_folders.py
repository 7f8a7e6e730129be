"""Which files of a folder hold the rows of a split, as hub, save_to_disk or people lay it out."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from dpo_kit.config.data_files import KNOWN, PACKED, ending
from dpo_kit.errors import DataError

ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # files that hold no rows
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-\w+)?")


def split_name(word: str) -> str:
    """The usual name of a split: test for eval, say."""
    return SPLITS.get(word.lower(), word)


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The files of `folder` that hold rows, of several splits those of `split`. Raises DataError."""
    named = {file: _split_of(file.relative_to(folder)) for file in sorted(_data_files(folder))}
    if not named:
        raise DataError(f"{folder} has no {', '.join(KNOWN)} file in it (nor one that is packed: {', '.join(PACKED)})")
    splits = sorted({name for name in named.values() if name})
    if not splits:
        return list(named)
    if without := [file for file, name in named.items() if not name]:
        both = f"files of the split {', '.join(splits)}, and {without[0].name} of none"
        raise DataError(f"{folder} has {both}: name the files themselves, as in data.train=[{without[0]}]")
    if split_name(split) not in splits:
        remedy = "say which with data.train_split and data.eval_split, or name the file itself"
        raise DataError(f"{folder} has the split {', '.join(splits)}, not {split!r}: {remedy}")
    return [file for file, name in named.items() if name == split_name(split)]


def _data_files(folder: Path) -> Iterable[Path]:
    """The files with rows, no hidden ones; in a folder of save_to_disk those that it names, not what lies beside."""
    for file in folder.rglob("*"):
        if any(part.startswith(".") for part in file.relative_to(folder).parts) or not file.is_file():
            continue
        if not ending(file) or file.name in ABOUT:
            continue
        state = file.with_name("state.json")
        if state.is_file() and file.with_name("dataset_info.json").is_file():
            try:
                saved = [entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{state} is not as save_to_disk writes it: save the data set again") from error
            if file.name not in saved:
                continue
        yield file


def _split_of(path: Path) -> str | None:
    """The split that the name of a file or of its folder says: of train_prefs-00000-of-00001.parquet train_prefs."""
    stem = path.name.removesuffix("".join(path.suffixes[-2:])) if path.suffix in PACKED else path.stem
    shard = _SHARD.fullmatch(stem)
    if shard and shard[1] != "data":
        return split_name(shard[1])
    if path.suffix == ".arrow" and path.parent.name:  # a data set dictionary on disk: a folder is a split
        return split_name(path.parent.name)
    words = (word for part in (stem, *reversed(path.parent.parts)) for word in re.split(r"[^a-z]+", part.lower()))
    return next((SPLITS[word] for word in words if word in SPLITS), None)
