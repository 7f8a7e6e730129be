"""Reading, checking and splitting: every row is kept, or counted with its place and reason."""

import gzip
import itertools
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dpo_kit.data.other_rows import interleave, unpair
from dpo_kit.data.prepare import prepare
from dpo_kit.data.read import Fault, Row, read_source
from dpo_kit.errors import DataError
from dpo_kit.toy import MODEL
from tests.preferences import data


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """Prepare rows (dicts, or raw lines) as a JSONL file through the whole path."""

    def run(rows, *, wanted="pairs", max_length=64, eval_rows=None, seed=0, **options):
        files = {"train": rows, "eval": eval_rows}
        for name, content in files.items():
            lines = [row if isinstance(row, str) else json.dumps(row) for row in content or []]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        held_out = str(tmp_path / "eval.jsonl") if eval_rows else None
        config = data(**{"train": str(tmp_path / "train.jsonl"), "eval": held_out} | options)
        return prepare(
            config, wanted=wanted, tokenizer=tokenizer, max_length=max_length, truncation="keep_start", seed=seed
        )

    return run


def pairs(n, **extra):
    return [
        {"prompt": f"My lamp is broken {i}.", "chosen": f"Replace it {i}.", "rejected": "No idea."} | extra
        for i in range(n)
    ]


def test_text_pairs_become_chat_turns_where_the_tokenizer_has_a_template(prepared):
    row = prepared(pairs(10)).train[0]
    assert [row[name][0]["role"] for name in ("prompt", "chosen", "rejected")] == ["user", "assistant", "assistant"]
    assert isinstance(prepared(pairs(10), wrap_as_chat=False).train[0]["prompt"], str)


def test_splits_share_no_prompt_and_do_not_depend_on_order_or_seed(prepared):
    rows = pairs(30) + pairs(30, chosen="Another answer.")
    one, other = prepared(rows), prepared(rows[::-1], seed=7)
    prompts = [{row["prompt_id"] for row in part} for part in (one.train, one.select, one.test)]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    assert [len(p) for p in prompts] == [24, 3, 3]
    assert {row["prompt_id"] for row in other.select} == prompts[1]


def test_however_small_the_share_two_prompts_are_held_out_one_to_choose_by_and_one_to_report(prepared):
    data = prepared(pairs(10), holdout=0.01)
    assert [len({row["prompt_id"] for row in part}) for part in (data.train, data.select, data.test)] == [8, 1, 1]


def test_prompts_of_the_eval_file_are_dropped_from_train_and_counted(prepared):
    data = prepared(pairs(10), eval_rows=pairs(4))
    assert len(data.train) == 6 and len(data.select) == len(data.test) == 2
    assert data.report["dropped_by_reason"] == {"prompt is held out": 4}


def test_rows_without_signal_are_dropped_and_counted(prepared):
    long = "word " * 100
    rows = [
        *pairs(10),
        {"prompt": "a", "chosen": "Same.", "rejected": "Same."},
        {"prompt": "b", "chosen": long + "yes.", "rejected": long + "no."},
        {"prompt": long, "chosen": "x y z", "rejected": "z"},
    ]
    report = prepared(rows).report
    assert report["dropped_by_reason"] == {
        "chosen and rejected are identical": 1,
        "identical after truncation to max_length": 1,
        "prompt fills max_length": 1,
    }
    assert sum(report["rows"].values()) == len(rows)
    assert [fault.place.rpartition(":")[2] for fault in prepared(rows).dropped] == ["11", "12", "13"]


MALFORMED = {
    '{"prompt": "a", "chosen": "b"': "not JSON",
    "[1, 2]": "not an object (list)",
    '{"prompt": "a", "prompt": "a", "chosen": "b", "rejected": "c"}': "key 'prompt' stands twice",
    '{"prompt": "a", "chosen": null, "rejected": "c"}': "column 'chosen' is missing or null",
    '{"prompt": "a", "chosen": " ", "rejected": "c"}': "chosen is empty",
    '{"prompt": "", "chosen": "b", "rejected": "c"}': "prompt is empty",
    '{"prompt": "a", "chosen": 3, "rejected": "c"}': "chosen is neither text nor a list of messages (int 3)",
    '{"prompt": "a", "chosen": [], "rejected": "c"}': "chosen is neither text nor a list",
    '{"prompt": "a", "chosen": [{"role": "bot", "content": "b"}], "rejected": "c"}': "an unknown role ('bot')",
    '{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}': "does not end with the assistant",
    '{"prompt": "a", "chosen": [{"role": "assistant", "content": 1}], "rejected": "c"}': "message without text content",
    '{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}': "chat messages are mixed",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_row_is_refused_with_its_line_or_dropped_and_counted(prepared, line):
    rows = [*pairs(10), line]
    with pytest.raises(DataError) as refusal:
        prepared(rows)
    assert "train.jsonl:11: " in str(refusal.value) and MALFORMED[line] in str(refusal.value)
    assert "data.on_bad_row=drop" in str(refusal.value)
    data = prepared(rows, on_bad_row="drop")
    assert data.report["rows"]["dropped"] == 1 and data.dropped[0].place.endswith("train.jsonl:11")


def test_misnamed_columns_are_refused_with_the_mapping_to_write(prepared):
    rows = [{"prompt": "a", "choosen": "b", "rejected": "c"}] * 3
    with pytest.raises(DataError, match=r"data.columns=\{chosen: choosen\}"):
        prepared(rows)
    with pytest.raises(DataError, match=r"no column 'answer' \(data.columns.chosen\)"):
        prepared(rows, columns={"chosen": "answer"})
    renamed = [{k if k != "chosen" else "good": v for k, v in row.items()} for row in pairs(10)]
    assert len(prepared(renamed, columns={"chosen": "good"}).train) == 8


def test_an_implicit_prompt_is_made_explicit(prepared):
    turn = {"role": "user", "content": "My lamp is broken."}
    rows = [
        {
            "chosen": [turn | {"content": f"{i}"}, {"role": "assistant", "content": "Replace it."}],
            "rejected": [turn | {"content": f"{i}"}, {"role": "assistant", "content": "No."}],
        }
        for i in range(10)
    ]
    row = prepared(rows).train[0]
    assert [m["role"] for m in row["prompt"]] == ["user"] and len(row["chosen"]) == 1


def test_unary_rows_do_not_train_a_pairwise_method(prepared):
    rows = [{"prompt": f"{i}", "completion": "Good answer.", "label": i % 3 > 0} for i in range(12)]
    assert prepared(rows, wanted="unary").report["desirable"] > 0
    with pytest.raises(DataError, match="method=kto"):
        prepared(rows)
    with pytest.raises(DataError, match="label is not true or false"):
        prepared([row | {"label": 1} for row in rows], wanted="unary")


def test_a_mixture_takes_each_source_by_its_weight(tmp_path, tokenizer, prepared):
    for name in "ab":
        rows = [{"prompt": f"{name} {i}", "chosen": "Yes.", "rejected": "No."} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(tmp_path / "a.jsonl"), "weight": 0.5}, {"path": str(tmp_path / "b.jsonl"), "weight": 2}]
    data = prepared(pairs(3), train=sources, holdout=0.1)

    def count(rows):
        return Counter(row["prompt"][0]["content"][0] for row in rows)

    train, held = data.train, count([*data.select, *data.test])
    assert count(train) == {"a": round((40 - held["a"]) / 2), "b": 2 * (40 - held["b"])}
    assert len({row["pair_id"] for row in train}) == len(train)


def test_bom_crlf_blank_lines_and_gzip_are_fine(tmp_path):
    text = '\ufeff{"a": 1}\r\n\r\n{"a": 2}\r\n'.encode()
    (tmp_path / "x.jsonl").write_bytes(text)
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "z.json").write_text('[{"a": 1}, {"a": 2}]')
    for name in ("x.jsonl", "y.jsonl.gz", "z.json"):
        assert [row.values for row in read_source(str(tmp_path / name), "train")] == [{"a": 1}, {"a": 2}]
    assert len(list(read_source(str(tmp_path), "train"))) == 6


def test_date_like_text_stays_text(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"chosen": "2024-01-01"}\n')
    assert next(iter(read_source(str(tmp_path / "x.jsonl"), "train"))).values == {"chosen": "2024-01-01"}


def test_a_parquet_file_reads_like_its_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(pairs(3)), tmp_path / "x.parquet")
    assert [row.values for row in read_source(str(tmp_path / "x.parquet"), "train")] == pairs(3)


def test_a_missing_file_names_the_near_miss(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"did you mean pairs.jsonl\?"):
        list(read_source(str(tmp_path / "pair.jsonl"), "train"))
    with pytest.raises(DataError, match="neither a local file or folder nor a hub data set"):
        list(read_source("nobody/nothing", "train"))


@given(st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line and b"\r" not in line), max_size=8))
@settings(max_examples=100, deadline=None)
def test_random_bytes_never_vanish_and_never_crash_the_reader(tmp_path_factory, lines):
    file = tmp_path_factory.mktemp("bytes") / "x.jsonl"
    file.write_bytes(content := b"".join(line + b"\n" for line in lines))
    try:
        found = list(read_source(str(file), "train"))
    except DataError:  # one JSON list, or UTF-16: refused as a whole
        assert content.lstrip()[:1] == b"[" or content[:2] in (b"\xff\xfe", b"\xfe\xff", b"\x00\x00")
        return
    written = [line.removeprefix(b"\xef\xbb\xbf") if i == 0 else line for i, line in enumerate(lines)]
    assert len(found) == sum(bool(line.strip()) for line in written)
    assert all(isinstance(item, Row | Fault) for item in found)


@given(st.integers(2, 60), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_kto_batches_have_both_labels_and_no_neighbours_of_one_prompt(prompts, answers, seed):
    rows = [
        {"prompt_id": str(p), "pair_id": f"{p}-{a}", "chosen": "c", "rejected": "r"}
        for p in range(prompts)
        for a in range(answers)
    ]
    order = interleave(unpair(rows), seed)
    key = [(row["pair_id"], row["label"]) for row in order]
    assert Counter(key) == Counter((row["pair_id"], label) for row in rows for label in (True, False))
    assert all({row["label"] for row in order[i : i + 2]} == {True, False} for i in range(0, len(order), 2))
    if prompts >= 4:
        assert all(a["prompt_id"] != b["prompt_id"] for a, b in itertools.pairwise(order))
    assert order == interleave(unpair(rows), seed)


@pytest.mark.parametrize(("prompts", "answers"), [(6, 1), (40, 1), (40, 3)])
def test_kto_sees_chosen_and_rejected_of_a_pair_half_the_data_apart(prompts, answers):
    rows = [
        {"prompt_id": str(number), "pair_id": f"{number}-{answer}", "chosen": "c", "rejected": "r"}
        for number in range(prompts)
        for answer in range(answers)
    ]
    order = interleave(unpair(rows), seed=0)
    place = {(row["pair_id"], row["label"]): index for index, row in enumerate(order)}
    apart = [abs(place[row["pair_id"], True] - place[row["pair_id"], False]) for row in rows]
    assert all(abs(distance - len(rows)) <= 2 for distance in apart), apart  # of 2 * len(rows)


def test_uneven_labels_are_spread_evenly():
    rows = [{"prompt_id": str(i), "label": i < 20} for i in range(100)]
    order = interleave(rows, seed=0)
    assert all(1 <= sum(row["label"] for row in order[i : i + 10]) <= 3 for i in range(0, 100, 10))
