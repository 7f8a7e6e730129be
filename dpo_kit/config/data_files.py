"""Which files a path means: one, a pattern's, or those of a folder (data_folders.py)."""

import glob
import re
from pathlib import Path

from dpo_kit.errors import DataError, did_you_mean

LINES, WHOLE, TABLES, CELLS = (".jsonl", ".ndjson"), (".json",), (".parquet", ".arrow"), (".csv", ".tsv")
PACKED = (".gz", ".zst")
KNOWN = LINES + WHOLE + TABLES + CELLS
ON_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def find_files(path: str, split: str) -> list[Path] | None:
    """The files that `path` means, in a folder those of `split`; None where it may be a hub data set. DataError."""
    local = Path(path).expanduser()
    if local.is_file():
        return [local]
    if (matching := [local] if local.exists() else match(path)) is not None:
        from dpo_kit.config.data_folders import files_of_split

        if not matching:
            raise DataError(f"no file matches {path}")
        return [file for each in matching for file in (files_of_split(each, split) if each.is_dir() else [each])]
    if ending(local) or not ON_HUB.fullmatch(path):
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
