"""The data report: planted faults are found, all of them and nothing else; figures by hand."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from dpo_kit.data.report import figures
from dpo_kit.data.report.duplicates import find_leaks, held_prompts, read_benchmark
from dpo_kit.data.report.figures import is_refusal, list_items, script_of
from dpo_kit.data.report.near import PERMUTATIONS, ROW_BANDS, cover, find_near, jaccard, sketch
from dpo_kit.errors import DataError
from tests.preferences import labels, pairs, report, tokenizer, words, write_jsonl


def change_a_word(text, rng):
    """One word of `text` replaced, its case and spacing changed: a near-duplicate of an answer of some length."""
    parts = text.upper().split()
    parts[rng.randrange(len(parts))] = "zebra"
    return "  ".join(parts) + "!"


def plant(clean, rng):
    """`clean` with 100 near-duplicates, 50 swapped twins, 20 leaks of `held`, 30 over-long rows; places of each."""
    rows = list(clean)
    near = [row | {"chosen": change_a_word(row["chosen"], rng)} for row in rng.sample(rows, 100)]
    twins = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:50]]
    long = [row | {"prompt": words(rng, 3000)} for row in pairs(30, seed=91)]
    return rows, near, twins, long


@pytest.mark.slow
@pytest.mark.fault("near-duplicates, swapped twins, leaks, over-long rows", promise="P4")
def test_planted_faults_are_all_found_and_nothing_else(tmp_path):
    rng = random.Random(7)
    clean, near, twins, long = plant(pairs(2000, seed=3, prompt=20, answer=60), rng)
    held = pairs(200, seed=55, prompt=20, answer=60)
    leaks = [row | {"prompt": change_case(held[i]["prompt"], i)} for i, row in enumerate(pairs(20, seed=77))]
    parts = [*(("clean", r) for r in clean), *(("near", r) for r in near), *(("twin", r) for r in twins)]
    parts += [*(("leak", r) for r in leaks), *(("long", r) for r in long)]
    rng.shuffle(parts)
    train = write_jsonl(tmp_path / "train.jsonl", [row for _, row in parts])
    found = report(train, eval=write_jsonl(tmp_path / "eval.jsonl", held), max_length=1024)
    exact = sum(leak["prompt"] == held[i]["prompt"] for i, leak in enumerate(leaks))
    assert found["dropped_by_reason"] == {"prompt fills max_length": 30, "prompt is held out": exact} and exact == 7
    assert found["leaks"]["rows"] == 20 - exact
    assert found["copies"]["rows"] == 0 and found["near_duplicates"]["comparisons_left_out"] == 0
    assert found["contradictions"] | {"places": None} == {"rows": 100, "comparisons": 50, "places": None}
    doubled = sum(row["prompt"] in {twin["prompt"] for twin in twins} for row in near)
    assert found["near_duplicates"]["rows"] == 100
    assert found["near_contradictions"]["rows"] == doubled  # the near-duplicates of rows that have a twin
    kinds = {f"{train}:{line}": kind for line, (kind, _) in enumerate(parts, start=1)}
    assert {kinds[place] for place in found["leaks"]["places"]} == {"leak"}
    assert {kinds[place] for place in found["contradictions"]["places"]} <= {"clean", "twin"}


def change_case(prompt, number):
    """Every third prompt as it stands, the others in another case or with another word."""
    return (prompt, prompt.title() + " ?", prompt + " please")[number % 3]


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_those_of_the_exact_index(seed):
    """Against all comparisons, without MinHash: the same rows, whatever the order."""
    rng = random.Random(seed)
    rows = pairs(60, seed=seed, prompt=8, answer=20)
    rows += [row | {"rejected": change_a_word(row["rejected"], rng)} for row in rng.sample(rows, 20)]
    expected, kept = set(), []
    for index, row in enumerate(rows):
        twin = any(all(jaccard(row[k], rows[other][k]) >= 0.8 for k in row) for other in kept)
        expected |= {index} if twin else set()
        kept += [] if twin else [index]
    leader, _, _ = find_near(rows, "pairs", sketch(rows, "pairs")[0], range(len(rows)))
    assert set(leader) == expected and 0 < len(expected) <= 20


def test_in_a_crowd_each_row_is_compared_with_the_first_fifty_and_the_rest_is_counted():
    alike = np.ones((60, PERMUTATIONS), np.uint32)  # one bucket in each of the ten bands
    leader, left_out = cover(alike, ROW_BANDS, range(60), lambda index, other: other == 49)
    assert leader == dict.fromkeys(range(50, 60), 49)
    assert left_out == 10 * sum(range(1, 10))  # rows 51 to 59 are 1 to 9 too many
    assert cover(alike, ROW_BANDS, range(60), lambda index, other: other == 50)[0] == {}


def test_the_overlap_of_shingles_by_hand():
    assert jaccard("a b c d", "A, b c  d!") == 1
    assert jaccard("a b c d", "a b c e") == pytest.approx(1 / 3)  # {abc, bcd}, {abc, bce}
    assert jaccard("a b", "a c") == 0 and jaccard("a b", "A b") == 1
    assert jaccard("我喜欢茶", "我喜欢茶水") == pytest.approx(2 / 3)


def test_the_share_of_equal_minhash_values_estimates_the_overlap():
    rows = pairs(60, seed=5, prompt=30)
    changed = [row | {"prompt": " ".join(row["prompt"].split()[:20] + ["new"] * 10)} for row in rows]
    one, other = sketch(rows, "pairs")[1], sketch(changed, "pairs")[1]
    exact = np.mean([jaccard(a["prompt"], b["prompt"]) for a, b in zip(rows, changed, strict=True)])
    assert 0.4 < exact < 0.6 and np.mean(one == other) == pytest.approx(exact, abs=0.04)  # standard error .01
    assert (one == sketch(rows[:1] + rows, "pairs")[1][1:]).all()


def test_copies_and_contradictions_are_counted(tmp_path):
    rows = pairs(10)
    swapped = {"prompt": rows[1]["prompt"], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}
    found = report(write_jsonl(tmp_path / "a.jsonl", [*rows, rows[0], rows[0], swapped]))
    assert found["copies"]["rows"] == 2
    assert found["contradictions"]["rows"] == 2 and found["contradictions"]["comparisons"] == 1
    assert {"contradictions", "copies", "size"} <= {warning["about"] for warning in found["warnings"]}
    rows = labels(12)
    found = report(write_jsonl(tmp_path / "b.jsonl", [*rows, rows[1] | {"label": not rows[1]["label"]}]))
    assert found["contradictions"]["rows"] == 2


def test_prompts_of_a_benchmark_are_found_in_any_turn(tmp_path):
    rows = pairs(10)
    turns = {"turns": ["Something else.", rows[0]["prompt"].upper() + "?"]}
    chat = {"messages": [{"role": "user", "content": rows[1]["prompt"]}, {"role": "assistant", "content": "Yes."}]}
    file = write_jsonl(tmp_path / "bench.jsonl", [turns, chat, {"question": rows[2]["prompt"] + " now"}])
    assert len(read_benchmark(file)) == 4
    found = report(write_jsonl(tmp_path / "a.jsonl", rows), benchmark=file, holdout=0.3)
    train = found["benchmark"]["places"]
    assert {place.rpartition(":")[2] for place in train} <= {"1", "2", "3"} and found["benchmark"]["rows"] == len(train)
    assert found["benchmark"]["rows"] >= 1
    with pytest.raises(DataError, match=r"bad.jsonl:1 has none of the columns prompt, question"):
        read_benchmark(write_jsonl(tmp_path / "bad.jsonl", [{"task": 1}]))


def test_a_turn_that_everybody_says_is_no_leak():
    long = "And now the same in the style of a sea shanty"

    def chat(*turns):
        return {"prompt": [{"role": "user", "content": turn} for turn in turns]}

    held = held_prompts([chat("Tell me a joke", "Please go on"), chat(long)])
    train = [
        chat("Where is Rome?", "Please go on"),
        chat("Sing", long.upper()),
        chat("tell me a JOKE", "please go on!"),
    ]
    assert find_leaks(train, held) == {1: held[1], 2: held[0]}


def test_length_bias_and_other_rules_by_hand(tmp_path):
    base = [
        {"chosen": "Long answer with many words.", "rejected": "Short."},  # longer
        {"chosen": "Short.", "rejected": "Long answer with many words."},
        {"chosen": "- one\n- two\n- three", "rejected": "one, two, three"},  # longer, list
        {"chosen": "I can do it and will.", "rejected": "I cannot do it."},  # longer, no refusal
    ]
    rows = [row | {"prompt": f"{text} {i}?"} for i, text in enumerate(["Who", "What", "Where"]) for row in base]
    found = report(write_jsonl(tmp_path / "a.jsonl", rows))["shortcuts"]
    count = len(tokenizer()("x").input_ids)
    assert count >= 1
    assert found["longer (characters)"]["accuracy"] == 0.75 and found["longer (characters)"]["decides"] == 1
    assert found["more list items"]["accuracy"] == pytest.approx(0.5 + 0.25 / 2)
    assert found["more list items"]["decides"] == 0.25
    assert found["no refusal"]["accuracy"] == pytest.approx(0.5 + 0.25 / 2)
    low, high = found["longer (characters)"]["low"], found["longer (characters)"]["high"]
    assert (low, high) == pytest.approx((0.4677, 0.9111), abs=1e-3)  # Wilson, 9 of 12


def test_answers_are_read_for_format_refusal_and_script():
    assert list_items("Do:\n1. a\n 2) b\n* c\n- d\nno - e") == 4
    assert (
        is_refusal("I’m sorry, but I can’t help.")
        and is_refusal("As an AI model, I")
        and not is_refusal("I am sorry about it.")
    )
    assert script_of("naïve café") == "Latin" and script_of("Привет, как дела") == "Cyrillic"
    assert script_of("我喜欢茶") == "Han" and script_of("お茶が好きです") == "Japanese"


def test_agreement_and_scores_by_hand():
    rows = [
        {"agreement": 0.6},
        {"agreement": "0.8"},
        {"votes": ["chosen", "chosen", "rejected"]},
        {"votes": {"chosen": 1, "rejected": 3}},
    ]
    rows += [{"agreement": 4}, {}]
    found = figures.measure_agreement(rows)
    assert found["rows"] == 4 and found["mean"] == pytest.approx((0.6 + 0.8 + 2 / 3 + 0.25) / 4)
    assert found["below_0.7"] == 0.75 and found["below_half"] == 0.25
    assert dict(found["histogram"])[0.6] == 2 and sum(dict(found["histogram"]).values()) == 4
    scored = [{"score_chosen": a, "score_rejected": b} for a, b in [(3, 1), (2, 2), (1, 5), (4, 1)]]
    found = figures.measure_scores(scored)
    assert (found["ties"], found["reversed"], found["gap"]["median"]) == (0.25, 0.25, 0)
    assert figures.measure_agreement([{}]) is None and figures.measure_scores([{}]) is None


@pytest.mark.parametrize(
    ("up", "down", "key", "low", "high"),
    [
        (50, 100, "desirable_weight", 2.0, 8 / 3),
        (200, 100, "undesirable_weight", 1.5, 2.0),
        (120, 100, "desirable_weight", 1.0, 1.0),
    ],
)
def test_suggested_weights_keep_the_classes_within_one_to_four_thirds(up, down, key, low, high):
    weights = figures.measure_classes([{"label": i < up} for i in range(up + down)])["weights"]
    assert weights[key] == pytest.approx([low, high])
    for which in (0, 1):
        ratio = up * weights["desirable_weight"][which] / (down * weights["undesirable_weight"][which])
        assert 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9


def test_every_warning_says_what_why_and_what_to_do(tmp_path):
    rng = random.Random(1)
    rows = [
        {
            "prompt": words(rng, 9),
            "chosen": "- " + words(rng, 30),
            "rejected": words(rng, 4),
            "source": "a" if i else "b",
            "agreement": 0.6,
            "score_chosen": i % 2,
            "score_rejected": 0.5,
        }
        for i in range(30)
    ]
    found = report(write_jsonl(tmp_path / "a.jsonl", rows), max_length=80)
    about = {warning["about"] for warning in found["warnings"]}
    assert {"shortcuts", "agreement", "scores", "balance", "size", "cut_at_max_length"} <= about
    assert all(warning[key] for warning in found["warnings"] for key in ("what", "why", "do"))
    json.dumps(found, allow_nan=False)


def test_prompts_of_one_pattern_form_a_cluster(tmp_path):
    rows = pairs(20)
    same = [
        row | {"prompt": f"please write a short poem about the sea and the number {i}"}
        for i, row in enumerate(pairs(10, 5))
    ]
    found = report(write_jsonl(tmp_path / "a.jsonl", [*rows, *same]))["diversity"]
    assert found["prompts"] == 30 and found["clusters"] == 21 and found["largest_cluster"] == pytest.approx(1 / 3)


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs real preference data beside the checkout")
def test_length_bias_and_agreement_of_real_pairs_are_those_of_a_plain_count():
    files = {name: SHARED / f"alpaca_prefs_{name}.jsonl" for name in ("train", "test")}
    rows = [json.loads(line) for file in files.values() for line in file.read_text().splitlines()]
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    found = report(str(files["train"]), eval=str(files["test"]))
    longer = sum((len(r["chosen"]) > len(r["rejected"])) + (len(r["chosen"]) >= len(r["rejected"])) for r in rows)
    assert found["shortcuts"]["longer (characters)"]["accuracy"] == pytest.approx(longer / 2 / len(rows))
    assert found["agreement"]["mean"] == pytest.approx(sum(row["agreement"] for row in rows) / len(rows))
    assert found["agreement"]["below_0.7"] == pytest.approx(sum(row["agreement"] < 0.7 for row in rows) / len(rows))
    assert found["near_duplicates"]["rows"] == found["copies"]["rows"] == found["contradictions"]["rows"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs real preference data beside the checkout")
def test_faults_planted_into_real_pairs_are_all_found(tmp_path):
    rng = random.Random(11)
    train, test = (
        [json.loads(line) for line in (SHARED / f"alpaca_prefs_{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    clean = write_jsonl(tmp_path / "a.jsonl", train)
    before = report(clean, eval=write_jsonl(tmp_path / "e.jsonl", test), max_length=16384)
    leaking = {int(place.rpartition(":")[2]) - 1 for place in before["leaks"]["places"]}
    sound = [row for index, row in enumerate(train) if index not in leaking]
    long_enough = [row for row in sound if min(len(row[k].split()) for k in ("chosen", "rejected")) > 60]
    near = [row | {"chosen": change_a_word(row["chosen"], rng)} for row in rng.sample(long_enough, 100)]
    twins = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rng.sample(long_enough, 50)]
    leaks = [row | {"prompt": test[i]["prompt"].lower()} for i, row in enumerate(pairs(20, seed=77))]
    long = [row | {"prompt": words(rng, 9000)} for row in pairs(30, seed=91)]
    planted = [*train, *near, *twins, *leaks, *long]
    after = report(write_jsonl(tmp_path / "b.jsonl", planted), eval=str(tmp_path / "e.jsonl"), max_length=16384)
    assert before["near_duplicates"]["rows"] == before["contradictions"]["rows"] == 0
    assert after["near_duplicates"]["rows"] == 100
    assert after["contradictions"] | {"places": 0} == {"rows": 100, "comparisons": 50, "places": 0}
    dropped = after["dropped_by_reason"]
    assert dropped["prompt fills max_length"] == 30
    held = dropped.get("prompt is held out", 0) + after["leaks"]["rows"]
    assert held - before["leaks"]["rows"] == 20
