"""Votes of people: majorities, agreement with hand-worked numbers, blinded sheets, files of raters."""

import csv
import json
import random

import pytest

from dpo_kit.config.settings import Data, HumanJudge
from dpo_kit.data.__main__ import compose_tool
from dpo_kit.data.build.pairs import build_pairs
from dpo_kit.data.build.rated import read_votes
from dpo_kit.errors import DataError
from dpo_kit.judge.open import open_judge
from dpo_kit.judge.review import ReviewSheet, majority, rater_agreement
from dpo_kit.judge.verdicts import Shown, compare


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (["a"], ("a", 1.0)),
        (["a", "b", "a"], ("a", 2 / 3)),
        (["a", "b"], ("tie", 0.5)),
        (["tie", "tie", "b"], ("tie", 2 / 3)),
        (["a", "a", "tie", "tie"], ("tie", 0.5)),
        (["b", "b", "tie", "a"], ("b", 0.5)),
    ],
)
def test_a_majority_is_what_most_say(votes, expected):
    assert majority(votes) == expected


def test_krippendorff_s_alpha_is_the_hand_worked_one():
    """Three raters, one item without a second vote.

    Coincidences: (a, a, b) gives aa 1, ab 1, ba 1; (b, b) gives bb 2; (a, a, a) gives aa 3: n_a = 5, n_b = 3, n = 8.
    Observed disagreement 2/8, expected 2·5·3/(8·7): alpha = 1 − (2/8)/(30/56) = 8/15.
    """
    items = [
        {"x": "a", "y": "a", "z": "b"},
        {"x": "b", "z": "b"},
        {"y": "tie"},
        {"x": "a", "y": "a", "z": "a"},
        {},
    ]
    found = rater_agreement(items)
    assert found.pop("krippendorff_alpha") == pytest.approx(8 / 15)
    assert found == {"items": 4, "raters": 3, "votes": 9, "majority_share": (2 / 3 + 1 + 1) / 3, "unanimous": 2 / 3}


def test_alpha_is_1_in_full_agreement_about_0_by_chance_and_undefined_without_variety():
    rng = random.Random()
    words = ["a", "b", "tie"]
    assert rater_agreement([{"x": w, "y": w} for w in words])["krippendorff_alpha"] == 1
    by_chance = [{"x": rng.choice(words), "y": rng.choice(words)} for _ in range(4000)]
    assert abs(rater_agreement(by_chance)["krippendorff_alpha"]) < 0.08  # five standard errors
    assert rater_agreement([{"x": "a", "y": "a"}] * 5)["krippendorff_alpha"] is None
    assert rater_agreement([{"x": "a"}, {"x": "b"}])["krippendorff_alpha"] is None
    assert rater_agreement([])["majority_share"] is None


# --- review sheets -----------------------------------------------------------------------------------------------

SHOWN = [Shown(f"question {i}", f"good answer {i}", f"bad answer {i}") for i in range(40)]


def fill(path, decide, into=None):
    """Fill the sheet in as a person who sees only what stands in it."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["better"] = decide(row["answer_1"], row["answer_2"])
    with (into or path).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def prefer_good(one, two):
    return "1" if one.startswith("good") else "2"


def test_a_sheet_is_blinded_and_shuffled_and_read_back(tmp_path):
    sheet = ReviewSheet(tmp_path / "review.csv", seed=3)
    sheet.write(SHOWN)
    rows = fill(sheet.path, prefer_good)
    places = [row["answer_1"].startswith("good") for row in rows]
    assert 8 < sum(places) < 32 and [row["message"] for row in rows] != [each.prompt for each in SHOWN]
    assert "good" not in sheet.key.read_text() and set(rows[0]) == {"id", "message", "answer_1", "answer_2", "better"}
    turned = [Shown(p, second, first) for p, first, second in SHOWN]
    assert sheet.decide(SHOWN) == ["first"] * 40 and sheet.decide(turned) == ["second"] * 40


def test_a_sheet_with_votes_in_it_is_never_written_again(tmp_path):
    sheet = ReviewSheet(tmp_path / "review.csv")
    sheet.write(SHOWN)
    fill(sheet.path, prefer_good)
    before = sheet.path.read_bytes()
    sheet.write(SHOWN[:3])
    assert sheet.path.read_bytes() == before and sheet.copies == [sheet.path]


def test_what_comes_later_goes_into_a_further_sheet(tmp_path):
    sheet = ReviewSheet(tmp_path / "review.csv")
    sheet.write(SHOWN[:10])
    fill(sheet.path, prefer_good)
    sheet.write(SHOWN)
    assert sheet.decide(SHOWN) == ["first"] * 10 + ["unjudged"] * 30
    assert len(fill(tmp_path / "review_2.csv", prefer_good)) == 30
    assert sheet.decide(SHOWN) == ["first"] * 40


def test_copies_of_a_sheet_are_several_raters(tmp_path):
    sheet = ReviewSheet(tmp_path / "review.csv", [str(tmp_path / f"{name}.csv") for name in "xyz"])
    sheet.write(SHOWN)
    for name, decide in (("x", prefer_good), ("y", prefer_good), ("z", lambda *_: "tie")):
        fill(sheet.path, decide, tmp_path / f"{name}.csv")
    assert sheet.decide(SHOWN[:5]) == ["first"] * 5
    found = sheet.agreement(SHOWN, ["first"] * 30 + ["second"] * 10)
    assert (found["checked"], found["same_verdict"], found["raters"]["raters"]) == (40, 0.75, 3)
    assert found["raters"]["majority_share"] == pytest.approx(2 / 3) and found["raters"]["unanimous"] == 0


def test_people_judge_in_two_steps(tmp_path):
    settings, rows = HumanJudge(kind="human"), [list(column) for column in zip(*SHOWN, strict=True)]
    with open_judge(settings, tmp_path) as judge:
        assert {verdict.outcome for verdict in compare(judge, *rows)} == {"unjudged"}
    fill(tmp_path / "review.csv", lambda one, two: "" if "7" in one else prefer_good(one, two))
    with open_judge(settings, tmp_path) as judge:
        outcomes = [verdict.outcome for verdict in compare(judge, *rows)]
        assert judge.spend()["raters"]["votes"] == 36
    assert outcomes == ["unjudged" if "7" in each.prompt else "win" for each in SHOWN]


def test_a_cell_is_never_a_formula(tmp_path):
    sheet = ReviewSheet(tmp_path / "review.csv")
    sheet.write([Shown("=1+1", "@SUM(A1)", '-2\nand more, "quoted"')])
    with sheet.path.open(encoding="utf-8-sig", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["message"] == "'=1+1" and {row["answer_1"], row["answer_2"]} == {"'@SUM(A1)", '\'-2\nand more, "quoted"'}


def test_what_cannot_be_read_in_a_sheet_is_named_with_its_line(tmp_path):
    sheet = ReviewSheet(tmp_path / "review.csv")
    sheet.write(SHOWN[:4])
    fill(sheet.path, lambda one, two: "left")
    with pytest.raises(DataError, match=r"review\.csv:2: better must be 1, 2 or tie .*'left'"):
        sheet.read()
    sheet.path.write_text("id,best\n1,2\n")
    with pytest.raises(DataError, match="needs the columns id and better"):
        sheet.read()


def test_a_sheet_saved_with_semicolons_is_read_too(tmp_path):
    sheet = ReviewSheet(tmp_path / "review.csv")
    sheet.write(SHOWN[:4])
    rows = fill(sheet.path, prefer_good)
    sheet.path.write_text("id;better\n" + "".join(f"{row['id']};{row['better']}\n" for row in rows))
    assert sheet.decide(SHOWN[:4]) == ["first"] * 4


# --- files of raters ---------------------------------------------------------------------------------------------


def written(tmp_path, rows):
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data():
    return Data(**compose_tool([]).data)


def item(number, **rest):
    return {"prompt": f"p{number}", "answer_a": f"first {number}", "answer_b": f"second {number}", **rest}


def test_a_rater_file_gives_majority_labels_and_agreement(tmp_path):
    rows = [
        item(0, votes=["a", "a", "b"]),
        item(1, votes=["b", "b", "b"]),
        item(2, votes=["a", "b", None]),
        item(3, votes=[None, None, None]),
        item(4, votes=["a", "a", "a"]) | {"answer_b": "first 4"},
        item(5, votes=["tie", "tie", "a"]),
    ]
    cfg = compose_tool([f"build.votes={written(tmp_path, rows)}", f"out={tmp_path / 'out'}"])
    report = build_pairs(cfg)
    assert report["items"] == {"in": 6, "pair": 2, "tie": 2, "identical": 1, "not voted": 1}
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert pairs[0] == {"prompt": "p0", "chosen": "first 0", "rejected": "second 0", "agreement": 2 / 3, "votes": 3}
    assert (pairs[1]["chosen"], pairs[1]["agreement"]) == ("second 1", 1.0)
    assert report["agreement"]["votes"] == 14 and -1 < report["agreement"]["krippendorff_alpha"] < 1


def test_one_row_a_vote_is_read_like_one_row_an_item(tmp_path):
    votes = [["a", "b", "a"], ["b", "b", None], ["tie", "a", "tie"]]
    wide = [item(i, votes={f"r{r}": vote for r, vote in enumerate(row)}) for i, row in enumerate(votes)]
    long = [item(i, rater=f"r{r}", vote=vote) for r in range(3) for i, vote in enumerate(row[r] for row in votes)]
    assert read_votes(written(tmp_path, wide), data()) == read_votes(written(tmp_path, long), data())


def test_agreement_does_not_depend_on_the_column_in_which_the_winner_stands(tmp_path):
    """Files often have the better answer first: raters who all say a would leave alpha undefined."""
    rng = random.Random()
    rows = [item(i, votes=["a", rng.choice("aab")]) for i in range(200)]
    turn = [rng.random() < 0.5 for _ in rows]
    mixed = [
        row
        | {
            "answer_a": row["answer_b"],
            "answer_b": row["answer_a"],
            "votes": ["ba"["ab".index(v)] for v in row["votes"]],
        }
        if turned
        else row
        for row, turned in zip(rows, turn, strict=True)
    ]
    found = [
        rater_agreement([each.votes for each in read_votes(written(tmp_path, some), data())]) for some in (rows, mixed)
    ]
    assert found[0] == found[1] and found[0]["krippendorff_alpha"] is not None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (item(0, votes=["c"]), r":1: a vote is a, b or tie, got 'c'"),
        (item(0, votes=["ties"]), r":1: .*did you mean tie\?"),
        (item(0), r":1: needs votes"),
        ({"prompt": "p", "votes": ["a"]}, r":1: answer_a must be text or chat messages, got None; columns: prompt"),
    ],
)
def test_a_faulty_row_of_votes_is_named(tmp_path, row, said):
    with pytest.raises(DataError, match=r"votes\.jsonl" + said):
        read_votes(written(tmp_path, [row]), data())


def test_a_rater_has_one_vote(tmp_path):
    rows = [item(0, rater="x", vote="a"), item(0, rater="x", vote="b")]
    with pytest.raises(DataError, match=r"votes\.jsonl:2: rater 'x' votes a second time"):
        read_votes(written(tmp_path, rows), data())
