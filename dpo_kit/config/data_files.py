"""Which files a path means: a file, the files of one split in a folder, or all that match a pattern."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from dpo_kit.errors import DataError, did_you_mean

LINES, WHOLE, TABLES, CELLS = (".jsonl", ".ndjson"), (".json",), (".parquet", ".arrow"), (".csv", ".tsv")
PACKED = (".gz", ".zst")
KNOWN = LINES + WHOLE + TABLES + CELLS
_ON_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def find_files(path: str, split: str) -> list[Path] | None:
    """The files that `path` means, of a folder with files of several splits those of `split`; None where it may be a
    data set of the hub. Raises DataError.
    """
    local = Path(path).expanduser()
    if local.exists() and not local.is_dir():
        return [local]
    matching = None if local.is_dir() else match(path)
    if matching is not None or local.is_dir():
        from dpo_kit.config.data_folders import files_of_split

        if matching is None:
            return files_of_split(local, split)
        if not matching:
            raise DataError(f"no file matches {path}")
        return [file for each in matching for file in ([each] if each.is_file() else files_of_split(each, split))]
    if ending(local) or not _ON_HUB.fullmatch(path):
        raise DataError(f"no such file or folder: {path}{near_miss(path)}")
    return None


def match(path: str) -> list[Path] | None:
    """The files and folders that the pattern `path` matches, sorted; None where it is no pattern."""
    if not any(sign in path for sign in "*?["):
        return None
    names = glob.glob(str(Path(path).expanduser()), recursive=True)  # noqa: PTH207 - absolute too
    return [Path(name) for name in sorted(names)]


def near_miss(path: str) -> str:
    """What beside `path`, or beside its nearest folder that is there, has a similar name."""
    place = Path(path).expanduser()
    while not place.parent.is_dir() and place != place.parent:
        place = place.parent
    try:
        return did_you_mean(place.name, (entry.name for entry in place.parent.iterdir()), count=2)
    except OSError:
        return ""


def ending(path: Path) -> str | None:
    """The known ending of a file's name, as .json of rows.json.gz; None where it is unknown."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return next((known for known in KNOWN if name.endswith(known)), None)
