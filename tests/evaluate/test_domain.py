"""Domain metrics: against scikit-learn, sacrebleu and rouge-score where they are there, and by hand."""

import json
import random
from pathlib import Path

import pytest

from dpo_kit.errors import DataError
from dpo_kit.evaluate.benchmarks.domain import (
    NO_LABEL,
    find_label,
    label_metrics,
    normalise,
    read_labelled,
    run_domain,
    text_metrics,
)
from dpo_kit.evaluate.options import Domain
from dpo_kit.evaluate.part import Speaker


def write_rows(folder: Path, rows: list) -> Domain:
    file = folder / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Domain(file=str(file))


def speaker(name: str, answers: list[str]) -> Speaker:
    return Speaker(name, lambda prompts, temperature: answers[: len(prompts)])


def figures(result) -> dict:
    return {each["metric"]: each for each in result["figures"]}


def test_a_label_is_found_where_one_alone_is_named():
    labels = ["spam", "not spam", "unsure"]
    for answer, label in {
        "Spam.": "spam", "It is **not  spam**!": "not spam", "I think: SPAM": "spam", "spam or unsure": NO_LABEL,
        "spammy": NO_LABEL, "": NO_LABEL, "Spam, spam, spam": "spam", "“Unsure”": "unsure",
        "not spam, but spam": NO_LABEL,
    }.items():  # fmt: skip
        assert find_label(answer, labels) == label, answer
    assert find_label("That is good enough, I think.", ["good", "good enough"]) == "good enough"
    asked = r"Answer: (\w+)"
    assert find_label("spam? no. Answer: unsure", labels, asked) == "unsure"
    assert find_label("Answer: spam ... wait. Answer: unsure.", labels, asked) == "unsure"
    assert find_label("unsure", labels, asked) == NO_LABEL and find_label("Answer: maybe", labels, asked) == NO_LABEL
    assert normalise("  ＡＢＣ　d. ") == "abc d"


def test_accuracy_precision_recall_and_f1_by_hand(tmp_path):
    """True a a a b b c; said a a b b (none) a. a: 2 right of 3 said and 3 there; b: 1 of 2 and 2; c: 0 of 0 and 1."""
    rows = [{"prompt": str(index), "label": label} for index, label in enumerate("aaabbc")]
    said = ["A", "a.", "b", "b", "no idea", "a"]
    given = write_rows(tmp_path, rows)
    result = run_domain(speaker("policy", said), speaker("reference", list("aaabbc")), given, tmp_path)
    assert (result["kind"], result["n"], result["unrecognised"]) == ("labels", 6, {"policy": 1, "reference": 0})
    found = figures(result)
    assert found["accuracy"]["policy"] == 0.5 and found["accuracy"]["reference"] == 1
    assert found["precision (macro)"]["policy"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["recall (macro)"]["policy"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["F1 (macro)"]["policy"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["accuracy"]["difference"] == -0.5 and found["accuracy"]["high"] <= 0
    kept = [json.loads(line) for line in (tmp_path / "domain.jsonl").read_text().splitlines()]
    assert kept[4] == {
        "prompt": "4", "target": "b", "policy": {"answer": "no idea", "read_as": NO_LABEL},
        "reference": {"answer": "b", "read_as": "b"},
    }  # fmt: skip
    assert (result["figures"][0]["metric"], result["figures"][0]["reference"]) == ("accuracy", 1)


def test_macro_figures_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn comes with the extra eval")
    import numpy as np

    rng = random.Random(7)
    labels = ["a", "b", "c", "d"]
    for _ in range(20):
        targets, said = (rng.choices(labels, k=30) for _ in range(2))
        said = [NO_LABEL if rng.random() < 0.1 else label for label in said]
        there = sorted((set(targets) | set(said)) - {NO_LABEL})
        theirs = metrics.precision_recall_fscore_support(targets, said, labels=there, average="macro", zero_division=0)
        accuracy, *macro = label_metrics(said, targets, labels)(np.arange(30)).values()
        assert macro == pytest.approx(theirs[:3])
        assert accuracy == metrics.accuracy_score(targets, said)


SENTENCES = [
    "The pump has to be tightened before it is used again.", "Nobody knows where the red kettle was last seen.",
    "Please clean the filter, then start the motor once more.", "Our desk opens at nine and closes in the evening.",
]  # fmt: skip


def disturbed(rng: random.Random) -> list[str]:
    return [" ".join(word for word in text.split() if rng.random() < 0.8) for text in SENTENCES]


def test_bleu_of_any_choice_of_rows_is_sacrebleu_s():
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu comes with the extra eval")
    rng = random.Random(2)
    said = disturbed(rng)
    pytest.importorskip("rouge_score", reason="rouge-score comes with the extra eval")
    metrics = text_metrics(said, SENTENCES)
    for rows in ([0, 1, 2, 3], [0, 0, 2], [1, 3], [2]):
        chosen = [[text[row] for row in rows] for text in (said, SENTENCES)]
        assert metrics(rows)["BLEU"] == pytest.approx(sacrebleu.corpus_bleu(chosen[0], [chosen[1]]).score)


def test_rouge_is_rouge_score_s_and_knows_other_scripts():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score comes with the extra eval")
    said = disturbed(random.Random(3))
    ours = text_metrics(said, SENTENCES)([0, 1, 2, 3])
    for name in ("rouge1", "rouge2", "rougeL"):
        theirs = [scorer.RougeScorer([name]).score(a, b)[name].fmeasure for a, b in zip(SENTENCES, said, strict=True)]
        assert ours[name.replace("rouge", "ROUGE-")] == pytest.approx(sum(theirs) / 4)
    russian = text_metrics(["чайник работает"], ["Чайник не работает"])([0])
    assert russian["ROUGE-1"] == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))


def test_texts_are_compared_as_texts(tmp_path):
    pytest.importorskip("sacrebleu", reason="sacrebleu comes with the extra eval")
    pytest.importorskip("rouge_score", reason="rouge-score comes with the extra eval")
    rows = [{"prompt": [{"role": "user", "content": text}], "reference": text} for text in SENTENCES]
    given = write_rows(tmp_path, rows)
    result = run_domain(
        speaker("policy", SENTENCES), speaker("reference", disturbed(random.Random(1))), given, tmp_path
    )
    found = figures(result)
    assert result["kind"] == "texts" and found["exact match"]["policy"] == 1
    assert found["BLEU"]["policy"] == pytest.approx(100) and found["ROUGE-L"]["policy"] == 1
    assert all(found[name]["low"] > 0 for name in ("BLEU", "ROUGE-1"))
    assert found["exact match"]["policy_low"] == 1 and result["unrecognised"] == {}


def test_the_paired_interval_is_that_of_scipy_and_narrower_than_two_apart(tmp_path):
    """300 rows that both models get right or wrong together, but for 30 that the policy lost."""
    stats = pytest.importorskip("scipy.stats")
    import numpy as np

    rows = [{"prompt": str(index), "label": "yes" if index % 2 else "no"} for index in range(300)]
    before = [row["label"] if index % 3 else "?" for index, row in enumerate(rows)]
    after = ["?" if index % 10 == 1 else said for index, said in enumerate(before)]
    result = run_domain(speaker("policy", after), speaker("reference", before), write_rows(tmp_path, rows), tmp_path)
    found = figures(result)["accuracy"]
    gaps = np.array(
        [(a == row["label"]) - 1.0 * (b == row["label"]) for a, b, row in zip(after, before, rows, strict=True)]
    )
    theirs = stats.bootstrap((gaps,), np.mean, method="percentile", rng=1).confidence_interval
    assert found["difference"] == pytest.approx(gaps.mean())
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert found["high"] - found["low"] < 0.75 * (found["policy_high"] - found["policy_low"])


def test_rows_that_cannot_be_used_are_named(tmp_path):
    good = {"prompt": "p", "label": 1}
    for rows, reason in (
        ([good, {"prompt": "p"}], r"labelled.jsonl:2 must have prompt"),
        ([good, {"prompt": "", "label": "a"}], r"labelled.jsonl:2 must have prompt"),
        ([good], "has 1 rows"),
        ([good, [1]], r"labelled.jsonl:2: not an object"),
        ([good, {"prompt": "p", "reference": "a"}], "rows with label and rows with reference: take one of them"),
        ([good | {"label": n} for n in range(1001)], "has 1,001 different labels.* call the column reference"),
    ):
        with pytest.raises(DataError, match=reason):
            read_labelled(write_rows(tmp_path, rows))
    with pytest.raises(DataError, match=r"domain\.file=.*no such file or folder"):
        read_labelled(Domain(file=str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match="is no regular expression"):
        Domain(file="x", pattern="(")
    with pytest.raises(ValueError, match="has 2 groups"):
        Domain(file="x", pattern="(a)(b)")
