"""People as judges: a blinded, shuffled sheet that they fill in, and what they wrote.

The sheet is a CSV file; who gave which answer, and in which order, is in the key file beside it. Copies of the sheet,
filled in by different people, are the votes of several raters.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from dpo_kit.errors import DataError
from dpo_kit.judge.verdicts import Judge, Raw, Shown, toss_coin
from dpo_kit.judge.votes import Vote, majority, rater_agreement
from dpo_kit.model.chats import conversation_text
from dpo_kit.run.files import read_json, write_json, write_text
from dpo_kit.run.journal import key_of

COLUMNS = ("id", "message", "answer_1", "answer_2", "better")
VOTES: dict[str, Vote] = {"1": "a", "2": "b", "tie": "tie", "0": "tie", "=": "tie"}
AS_VOTE: dict[Raw, Vote] = {"first": "a", "second": "b", "tie": "tie", "unparsable": "tie"}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


class ReviewSheet:
    """The sheet at `path`, its key, and its filled-in copies (`copies`; none: the sheet itself)."""

    def __init__(self, path: Path, copies: Sequence[str] = (), seed: int = 0) -> None:
        self.path, self.seed = path, seed
        self.key = path.with_name(f"{path.stem}_key.json")
        self._copies = [Path(copy).expanduser() for copy in copies]

    @property
    def copies(self) -> list[Path]:
        return self._copies or sorted(self.path.parent.glob(f"{self.path.stem}*.csv"))

    def write(self, shown: Iterable[Shown]) -> None:
        """Make the sheet and its key, in random order.

        A sheet that is there may hold votes and is left alone: what is in none yet goes into a further one
        (`review_2.csv`, …).
        """
        key = self._read_key()
        new = {item: each for each in shown if (item := _item(each)) not in key}
        if not new:
            return
        text = io.StringIO(newline="")
        sheet = csv.writer(text)
        sheet.writerow(COLUMNS)
        for item, each in sorted(new.items()):
            answers = sorted((each.first, each.second), reverse=not toss_coin(self.seed, item))
            cells = [item, conversation_text(each.prompt), *answers]
            # a cell that no spreadsheet takes for a formula
            sheet.writerow([*(f"'{cell}" if cell.startswith(FORMULA) else cell for cell in cells), ""])
            key[item] = [key_of(answer) for answer in answers]
        further = (self.path.with_name(f"{self.path.stem}_{number}.csv") for number in count(2))
        write_text(next(path for path in chain([self.path], further) if not path.exists()), "\ufeff" + text.getvalue())
        write_json(self.key, key)

    def decide(self, shown: Sequence[Shown]) -> list[Raw]:
        """The majority of the raters on each; unjudged where nobody voted. DataError names what cannot be read."""
        key, votes = self._read_key(), self.read()
        verdicts: list[Raw] = []
        for each in shown:
            item = _item(each)
            if item not in key or item not in votes:
                verdicts.append("unjudged")
                continue
            won, _ = majority(list(votes[item].values()))
            is_first = won != "tie" and key[item]["ab".index(won)] == key_of(each.first)
            verdicts.append("tie" if won == "tie" else "first" if is_first else "second")
        return verdicts

    def read(self) -> dict[str, dict[str, Vote]]:
        """{item: {rater: vote}}; a and b are the answers in the order of the sheet."""
        votes: dict[str, dict[str, Vote]] = {}
        for copy in self.copies:
            for place, row in _read_sheet(copy):
                word = (row["better"] or "").strip().lower()
                if word and word not in VOTES:
                    raise DataError(f"{place}: better must be 1, 2 or tie (or empty: not voted), got {word!r}")
                if word:
                    votes.setdefault(row["id"], {})[str(copy)] = VOTES[word]
        return votes

    def agreement(self, shown: Sequence[Shown], verdicts: Sequence[Raw]) -> dict[str, Any]:
        """How far the raters agree with each other, and their majority with the `verdicts` on `shown`."""
        people = self.decide(shown)
        both = [(p, v) for p, v in zip(people, verdicts, strict=True) if "unjudged" not in (p, v)]
        of_both: list[dict[str, Vote]] = [{"people": AS_VOTE[p], "judge": AS_VOTE[v]} for p, v in both]
        return {
            "checked": len(both),
            "same_verdict": sum(p == v for p, v in both) / len(both) if both else None,
            "krippendorff_alpha": rater_agreement(of_both)["krippendorff_alpha"],
            "raters": rater_agreement(list(self.read().values())),
        }

    def _read_key(self) -> dict[str, list[str]]:
        return read_json(self.key) if self.key.exists() else {}


class HumanJudge(Judge):
    """The sheet as a judge: written the first time, read from then on. One vote stands for both orders."""

    name = "human"

    def __init__(self, sheet: ReviewSheet) -> None:
        self.sheet = sheet

    def decide(self, shown: Sequence[Shown]) -> list[Raw]:
        self.sheet.write(shown)
        return self.sheet.decide(shown)

    def spend(self) -> dict[str, Any]:
        return {"raters": rater_agreement(list(self.sheet.read().values()))}


def _item(shown: Shown) -> str:
    return key_of(shown.prompt, *sorted((shown.first, shown.second)))[:12]


def _read_sheet(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the review sheet {path} cannot be read: {error}; save it as CSV in UTF-8") from error
    header = text.partition("\n")[0]
    delimiter = max((",", ";", "\t"), key=header.count)  # spreadsheets save with what their country separates by
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    if not {"id", "better"} <= set(reader.fieldnames or ()):
        raise DataError(
            f"{path} needs the columns id and better, and has {', '.join(reader.fieldnames or ['none'])}: fill in "
            "a copy of the sheet as it was written"
        )
    for row in reader:
        yield f"{path}:{reader.line_num}", row
