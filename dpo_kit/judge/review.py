"""People as judges: a blinded, shuffled sheet that they fill in, what they wrote, and how far they agree.

The sheet is a CSV file; who gave which answer, and in which order, is in the key file beside it. Copies of the sheet,
filled in by different people, are the votes of several raters.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

from dpo_kit.errors import DataError
from dpo_kit.judge.verdicts import Judge, Raw, Shown, Verdict, toss_coin
from dpo_kit.run.files import read_json, write_json, write_text
from dpo_kit.run.journal import key_of

Vote = Literal["a", "b", "tie"]
CODES: dict[Vote, int] = {"a": 0, "b": 1, "tie": 2}
VOTES: dict[str, Vote] = {"1": "a", "2": "b", "tie": "tie", "0": "tie", "=": "tie"}
AS_VOTE: dict[Raw, Vote] = {"first": "a", "second": "b", "tie": "tie", "unparsable": "tie"}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


class ReviewSheet(Judge):
    """The sheet at `path`, its key, and its filled-in copies (`copies`; none: the sheet itself). As a judge it is
    written the first time and read from then on; one vote stands for both orders.
    """

    name = "human"

    def __init__(self, path: Path, copies: Sequence[str] = (), seed: int = 0) -> None:
        self.path, self.seed = path, seed
        self.key = path.with_name(f"{path.stem}_key.json")
        self._copies = [Path(copy).expanduser() for copy in copies]

    @property
    def copies(self) -> list[Path]:
        return self._copies or sorted(self.path.parent.glob(f"{self.path.stem}*.csv"))

    def write(self, shown: Iterable[Shown]) -> None:
        """Make sheet and key in random order; what no sheet has yet goes into a further one: they may hold votes."""
        key = self._read_key()
        new = {item: each for each in shown if (item := _item(each)) not in key}
        if not new:
            return
        text = io.StringIO(newline="")
        sheet = csv.writer(text)
        sheet.writerow(("id", "message", "answer_1", "answer_2", "better"))
        for item, each in sorted(new.items()):
            answers = sorted((each.first, each.second), reverse=not toss_coin(self.seed, item))
            cells = [item, each.parts["message"], *answers]
            # a cell that no spreadsheet takes for a formula
            sheet.writerow([*(f"'{cell}" if cell.startswith(FORMULA) else cell for cell in cells), ""])
            key[item] = [key_of(answer) for answer in answers]
        further = (self.path.with_name(f"{self.path.stem}_{number}.csv") for number in count(2))
        write_text(next(path for path in chain([self.path], further) if not path.exists()), "\ufeff" + text.getvalue())
        write_json(self.key, key)

    def decide(self, shown: Sequence[Shown]) -> list[Raw]:
        """The majority of the raters on each; unjudged where nobody voted. DataError names what cannot be read."""
        self.write(shown)
        return self._verdicts(shown)

    def spend(self) -> dict[str, Any]:
        return {"raters": rater_agreement(list(self.read().values()))}

    def _verdicts(self, shown: Sequence[Shown]) -> list[Raw]:
        key, votes = self._read_key(), self.read()
        verdicts: list[Raw] = []
        for item, each in ((_item(each), each) for each in shown):
            won = majority(list(votes[item].values()))[0] if item in key and item in votes else "unjudged"
            if won in ("a", "b"):
                verdicts.append("first" if key[item]["ab".index(won)] == key_of(each.first) else "second")
            else:
                verdicts.append("tie" if won == "tie" else "unjudged")
        return verdicts

    def points(self, shown: Sequence[Shown]) -> list[float | None]:
        """What people's votes give the first answer: 1, 0, or ½ for a tie and for twice the same answer; None where
        nobody voted.
        """
        of = {"first": 1.0, "second": 0.0, "tie": 0.5}
        votes = zip(self._verdicts(shown), shown, strict=True)
        return [0.5 if raw in of and each.first == each.second else of.get(raw) for raw, each in votes]

    def read(self) -> dict[str, dict[str, Vote]]:
        """{item: {rater: vote}}; a and b are the answers in the order of the sheet."""
        votes: dict[str, dict[str, Vote]] = {}
        for copy in self.copies:
            try:
                text = copy.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"the review sheet {copy} cannot be read: {error}; save it as CSV in UTF-8") from error
            header = text.partition("\n")[0]
            # spreadsheets save with what their country separates by
            delimiter = max((",", ";", "\t"), key=header.count)
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
            if not {"id", "better"} <= set(reader.fieldnames or ()):
                raise DataError(
                    f"{copy} needs the columns id and better, and has {', '.join(reader.fieldnames or ['none'])}: "
                    "fill in a copy of the sheet as it was written"
                )
            for row in reader:
                word = (row["better"] or "").strip().lower()
                if word and word not in VOTES:
                    place = f"{copy}:{reader.line_num}"
                    raise DataError(f"{place}: better must be 1, 2 or tie (or empty: not voted), got {word!r}")
                if word:
                    votes.setdefault(row["id"], {})[str(copy)] = VOTES[word]
        return votes

    def check(self, judged: Sequence[tuple[Shown, Verdict]], wanted: int) -> dict[str, Any] | None:
        """A judge checked by people: `wanted` of what it `judged`, by lot, in a sheet that is read later."""
        if not (wanted or self.copies):
            return None
        known = [(shown, verdict) for shown, verdict in judged if verdict.points is not None]
        if not self.copies:
            self.write(sorted((shown for shown, _ in known), key=lambda shown: key_of(self.seed, *shown))[:wanted])
        raw: dict[str, Raw] = {"win": "first", "loss": "second"}
        verdicts = [raw.get(verdict.outcome, "tie") for _, verdict in known]
        return {"sheet": str(self.path), **self.agreement([shown for shown, _ in known], verdicts)}

    def agreement(self, shown: Sequence[Shown], verdicts: Sequence[Raw]) -> dict[str, Any]:
        """How far the raters agree with each other, and their majority with the `verdicts` on `shown`."""
        both = [(p, v) for p, v in zip(self._verdicts(shown), verdicts, strict=True) if "unjudged" not in (p, v)]
        of_both: list[dict[str, Vote]] = [{"people": AS_VOTE[p], "judge": AS_VOTE[v]} for p, v in both]
        return {
            "checked": len(both),
            "same_verdict": sum(p == v for p, v in both) / len(both) if both else None,
            "krippendorff_alpha": rater_agreement(of_both)["krippendorff_alpha"],
            **self.spend(),
        }

    def _read_key(self) -> dict[str, list[str]]:
        return read_json(self.key) if self.key.exists() else {}


def _item(shown: Shown) -> str:
    return key_of(shown.prompt, *sorted((shown.first, shown.second)))[:12]


def majority(votes: Sequence[Vote]) -> tuple[Vote, float]:
    """What most raters say and its share; “tie” where neither a nor b has most. ValueError where nobody voted."""
    if not votes:
        raise ValueError("a majority needs at least one vote")
    (first, most), *others = Counter(votes).most_common()
    shared = bool(others) and others[0][1] == most
    return "tie" if shared else first, most / len(votes)


def rater_agreement(items: Sequence[Mapping[str, Vote]]) -> dict[str, Any]:
    """How far the raters of `items` ({rater: vote} each; raters may be missing) agree.

    `krippendorff_alpha` (nominal): 1 full agreement, 0 what chance would give; None where fewer than two votes can be
    compared or all votes are the same, so that chance explains everything. Which answer is a must not depend on who
    wins. `majority_share`: the mean share of votes for what most say; `unanimous`: share of items with one voice.
    """
    voted = [votes for votes in items if votes]
    raters = sorted({rater for votes in voted for rater in votes})
    comparable = [votes for votes in voted if len(votes) > 1]
    shares = [majority(list(votes.values()))[1] for votes in comparable]
    alpha = None
    if len({vote for votes in comparable for vote in votes.values()}) > 1:
        import krippendorff
        import numpy

        table = [[CODES[votes[r]] if r in votes else numpy.nan for votes in comparable] for r in raters]
        alpha = float(krippendorff.alpha(reliability_data=table, level_of_measurement="nominal"))
    return {
        "items": len(voted), "raters": len(raters), "votes": sum(map(len, voted)), "krippendorff_alpha": alpha,
        "majority_share": sum(shares) / len(shares) if shares else None,
        "unanimous": shares.count(1.0) / len(shares) if shares else None,
    }  # fmt: skip
