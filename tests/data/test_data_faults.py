# ruff: noqa: E501 - one case a line
"""Every fault that data can have: named with place, reason and remedy, then refused or dropped by a stated rule."""

import datetime
import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_kit.data.read import Fault, Row, read_source
from dpo_kit.errors import DataError
from tests.preferences import labels, pairs, prepared, write_jsonl

USER = {"role": "user", "content": "My lamp is broken."}
GOOD = {"role": "assistant", "content": "Replace the bulb."}
BAD = {"role": "assistant", "content": "No idea."}


def fault(name, *values):
    return pytest.param(*values, marks=pytest.mark.fault(name, promise="P4"), id=name.replace(" ", "-"))


def pair(**values):
    return json.dumps({"prompt": "My lamp is broken.", "chosen": "Replace it.", "rejected": "No idea."} | values)


ROWS = [  # one bad line among good ones: the line, the reason, the remedy
    fault("cut line", '{"prompt": "a", "chosen": "b", "rej', "not JSON (Unterminated string", "the line is cut"),
    fault("no object", "[1, 2]", "not an object (list)", "a row is {"),
    fault("two objects in a line", pair() + pair(), "not JSON (Extra data at column", "one object a line"),
    fault("duplicate key", '{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}', "key 'prompt' stands twice", "mend"),
    fault("duplicate key in a message", '{"prompt": "a", "chosen": [{"role": "assistant", "role": "user", "content": "b"}], "rejected": "d"}', "key 'role' stands twice", "mend"),
    fault("not a number", pair(score_chosen=float("nan")), "NaN is no JSON: write null", "mend"),
    fault("half a character", '{"prompt": "a", "chosen": "\\ud83d", "rejected": "d"}', "half a character", "as UTF-8"),
    fault("empty answer", pair(chosen=""), "chosen is empty ('')", "leave the row out"),
    fault("blank answer", pair(rejected=" \n\t"), "rejected is empty", "leave the row out"),
    fault("invisible answer", pair(rejected="\u200b"), "rejected is empty", "leave the row out"),
    fault("empty prompt", pair(prompt=""), "prompt is empty", "leave the row out"),
    fault("missing column", '{"prompt": "a", "chosen": "b"}', "column 'rejected' is missing or null", "fill it in"),
    fault("misspelt column in one row", '{"prompt": "a", "choosen": "b", "rejected": "c"}', "column 'chosen' is missing", "did you mean choosen?"),
    fault("wrong type", pair(chosen=3), "chosen is neither text nor a list of messages (int 3)", "write text"),
    fault("text and chat in one row", pair(chosen=[GOOD]), "text and chat messages are mixed", "write both answers as text"),
    fault("unknown role", pair(chosen=[GOOD | {"role": "bot"}]), "chosen has an unknown role ('bot')", "known are system"),
    fault("content that is no text", pair(chosen=[GOOD | {"content": 1}]), "message without text content", "content as text"),
    fault("chat that ends with the user", pair(chosen=[USER]), "chosen does not end with the assistant (user)", "last message"),
    fault("prompt repeated in the answer", pair(chosen="My lamp is broken. Replace it."), "chosen repeats the prompt", "cut it off"),
    fault("no prompt at all", '{"chosen": "Yes", "rejected": "No"}', "chosen and rejected begin differently", "add the prompt"),
    fault("whole transcripts", '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}', "chosen is a whole transcript", "hh_rlhf"),
]  # fmt: skip
LABELS = [
    fault("label -1 and +1", -1, "label is not true or false (-1)"),
    fault("label 1 and 2", 2, "label is not true or false (2)"),
    fault("label in quotes", "true", "label is not true or false ('true')"),
    fault("label 0 and 1", 1, "label is not true or false (1)"),
]


@pytest.mark.parametrize(("line", "reason", "remedy"), ROWS)
def test_a_bad_row_is_refused_with_line_reason_and_remedy_or_dropped_and_counted(tmp_path, line, reason, remedy):
    rows = pairs(10)
    file = write_jsonl(tmp_path / "train.jsonl", [*rows[:4], line, *rows[4:]])
    with pytest.raises(DataError) as refusal:
        prepared(file)
    assert f"{file}:5: " in str(refusal.value) and reason in str(refusal.value) and remedy in str(refusal.value)
    kept = prepared(file, on_bad_row="drop")
    assert [dropped.place for dropped in kept.dropped] == [f"{file}:5"]
    assert sum(kept.report["rows"].values()) == kept.report["rows_read"] == 11


@pytest.mark.parametrize(("label", "reason"), LABELS)
def test_a_label_that_is_no_truth_value_is_refused(tmp_path, label, reason):
    file = write_jsonl(tmp_path / "train.jsonl", [*labels(12), labels(1)[0] | {"label": label}])
    with pytest.raises(DataError) as refusal:
        prepared(file, wanted="unary")
    assert f"{file}:13: {reason}" in str(refusal.value) and "write true or false" in str(refusal.value)


@pytest.mark.fault("labels of one class", promise="P4")
def test_labels_of_one_class_are_refused(tmp_path):
    file = write_jsonl(tmp_path / "train.jsonl", [row | {"label": True} for row in labels(12)])
    with pytest.raises(DataError, match=r"every label to train on is true.*add rows with label false"):
        prepared(file, wanted="unary")


@pytest.mark.fault("misspelt column", promise="P4")
def test_a_misspelt_column_is_refused_with_the_mapping_to_write(tmp_path):
    rows = [{"prompt": "a", "choosen": "b", "rejected": "c"}] * 3
    with pytest.raises(DataError, match=r"data.columns=\{chosen: choosen\}"):
        prepared(write_jsonl(tmp_path / "train.jsonl", rows))


@pytest.mark.fault("text rows and chat rows", promise="P4")
def test_text_rows_beside_chat_rows_are_refused_with_one_of_each(tmp_path):
    chat = [{"prompt": [USER | {"content": f"{i}?"}], "chosen": [GOOD], "rejected": [BAD]} for i in range(5)]
    file = write_jsonl(tmp_path / "train.jsonl", [*pairs(5), *chat])
    with pytest.raises(DataError) as refusal:
        prepared(file)
    assert f"text rows (such as {file}:1) and chat rows ({file}:6) are mixed" in str(refusal.value)
    assert len(prepared(file, wrap_as_chat=True).train) == 8


@pytest.mark.fault("bad UTF-8", promise="P4")
def test_bytes_that_are_no_utf8_are_named_with_line_and_byte(tmp_path):
    file = tmp_path / "train.jsonl"
    good = [json.dumps(row).encode() for row in pairs(10)]
    file.write_bytes(b"\n".join([*good, b'{"prompt": "caf\xe9", "chosen": "b", "rejected": "c"}']))
    with pytest.raises(DataError, match=r"train.jsonl:11: not UTF-8 \(byte 15 is 0xe9\): save the file as UTF-8"):
        prepared(str(file))
    whole = tmp_path / "train.json"
    whole.write_bytes(b'[\n{"prompt": "caf\xe9"}]')
    with pytest.raises(DataError, match=r"train.json:2: not UTF-8"):
        list(read_source(str(whole), "train"))
    table = tmp_path / "train.csv"
    table.write_bytes(b"prompt,chosen,rejected\na,b,c\ncaf\xe9,b,c\n")
    assert str(list(read_source(str(table), "train"))[1]).startswith(f"{table}:3: not UTF-8 (in column 'prompt')")


@pytest.mark.fault("cut archive", promise="P4")
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_cut_archive_is_refused_since_what_is_lost_cannot_be_counted(tmp_path, share):
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in pairs(300)).encode())
    file = tmp_path / "train.jsonl.gz"
    file.write_bytes(packed[: int(share * len(packed))])
    with pytest.raises(DataError, match=r"train.jsonl.gz:\d+: the compressed file is cut or damaged.*copy it again"):
        prepared(str(file), on_bad_row="drop")


@pytest.mark.fault("cut JSON list", promise="P4")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"a": ', r"x.json:2: not JSON: .* at column \d+ \(the file is cut\)"),
        ('[{"a": 1}', r"x.json:1: not JSON: expecting ',' or ']' at column 10 \(the file is cut\)"),
        ('[{"a": 1},]', r"x.json:1: not JSON: Expecting value at column 11"),
        ('[{"a": 1}] x', r"x.json:1: not JSON: text after the list"),
        ('{"a": 1}', r"must hold one JSON list of rows; one row a line is a .jsonl file"),
        ("", r"must hold one JSON list of rows"),
    ],
)
def test_a_broken_json_list_is_refused_with_line_and_column(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_source(str(tmp_path / "x.json"), "train"))


def test_a_fault_inside_a_row_of_a_json_list_costs_only_that_row(tmp_path):
    (tmp_path / "x.json").write_text('[{"a": 1}, {"a": 2, "a": 3}, 4, {"a": 5}]')
    found = list(read_source(str(tmp_path / "x.json"), "train"))
    assert [type(item) for item in found] == [Row, Fault, Fault, Row]
    assert found[1].place.endswith("x.json row 1") and found[1].found == "key 'a' stands twice"


@pytest.mark.fault("date-like text", promise="P4")
def test_date_like_text_stays_text_and_real_timestamps_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row | {"rejected": f"2024-01-{1 + i:02}"} for i, row in enumerate(pairs(10))]
    table = tmp_path / "x.csv"
    table.write_text(
        "prompt,chosen,rejected\n" + "".join(f"{r['prompt']},{r['chosen']},{r['rejected']}\n" for r in rows)
    )
    assert prepared(str(table)).train[0]["rejected"][0]["content"].startswith("2024-01-")
    stamped = [row | {"rejected": datetime.datetime(2024, 1, 1 + i)} for i, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(stamped), tmp_path / "x.parquet")
    with pytest.raises(
        DataError, match=r"x.parquet row 0: rejected is a timestamp, not text .*write the column as text"
    ):
        prepared(str(tmp_path / "x.parquet"))


@pytest.mark.fault("CSV that is none", promise="P4")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n", r"x.csv:2: wrong number of cells \(3, the header has 2\): quote commas"),
        ('1,"b" c\n', r"x.csv:2: not CSV \(',' expected after '\"', up to line 2\): quote the cell"),
    ],
)
def test_a_bad_line_of_a_csv_file_costs_only_that_line(tmp_path, text, message):
    file = tmp_path / "x.csv"
    file.write_text("a,b\n" + text + '"two\nlines",3\n')
    bad, good = read_source(str(file), "train")
    assert good == Row(f"{file}:3", {"a": "two\nlines", "b": "3"}, typed=False)
    assert re.search(message, str(bad))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a,b\n1,"open\n2,3\n', r"x.csv:2: a quote that opens here is never closed"),
        ("a,a\n1,2\n", r"x.csv:1: the column 'a' stands twice"),
        ("", r"x.csv:1: a CSV file needs a header line"),
    ],
)
def test_a_csv_file_whose_rows_cannot_be_counted_is_refused(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_source(str(tmp_path / "x.csv"), "train"))


def test_csv_has_no_types_so_true_and_false_are_labels_there(tmp_path):
    rows = "".join(f"{r['prompt']},{r['completion']},{r['label']}\n" for r in labels(12))
    (tmp_path / "x.csv").write_text("prompt,completion,label\n" + rows)
    assert prepared(str(tmp_path / "x.csv"), wanted="unary").report["desirable"] > 0


def test_bom_crlf_and_blank_lines_are_fine(tmp_path):
    lines = "\r\n\r\n".join(json.dumps(row) for row in pairs(10))
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    cells = "".join(f"{r['prompt']},{r['chosen']},{r['rejected']}\r\n\r\n" for r in pairs(10))
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\r\n" + cells.encode())
    for name in ("x.jsonl", "x.csv"):
        assert prepared(str(tmp_path / name)).report["rows_read"] == 10


def test_a_short_prompt_may_begin_an_answer_and_marks_are_text_where_text_is_raw(tmp_path):
    rows = [*pairs(10), {"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi."}]
    assert prepared(write_jsonl(tmp_path / "a.jsonl", rows)).report["rows"]["dropped"] == 0
    rows = [row | {"prompt": f"<|user|>{row['prompt']}<|end|><|assistant|>"} for row in pairs(10)]
    assert prepared(write_jsonl(tmp_path / "b.jsonl", rows), wrap_as_chat=False).report["rows"]["dropped"] == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "bot", 1]), "content": st.text(max_size=8) | JSON}
)
VALUE = st.text(max_size=12) | st.lists(MESSAGE, max_size=3) | JSON
NAMES = ("prompt", "chosen", "rejected", "completion", "label", "agreement", "votes", "tokens", "prompt_id")
ROW = st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=6) | JSON


@given(
    st.lists(st.builds(json.dumps, ROW).map(str.encode) | st.binary(max_size=30), max_size=6),
    st.sampled_from(["pairs", "unary"]),
    st.sampled_from(["auto", True, False]),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.fault("random bytes and rows", promise="P4")
def test_random_rows_are_kept_or_counted_and_nothing_else_ever_happens(tmp_path_factory, lines, wanted, wrap):
    clean = [line.replace(b"\n", b" ").replace(b"\r", b" ") for line in lines]
    good = pairs(6) if wanted == "pairs" else labels(9)
    file = tmp_path_factory.mktemp("random") / "x.jsonl"
    file.write_bytes(b"\n".join([*(json.dumps(row).encode() for row in good), *clean]))
    try:
        found = prepared(str(file), wanted=wanted, wrap_as_chat=wrap, on_bad_row="drop")
    except DataError:
        return
    held = len(found.select) + len(found.test)
    trained = found.report["rows"]["train"]
    assert trained + held + len(found.dropped) == len(good) + sum(bool(line.strip()) for line in clean)
    assert all(dropped.reason and dropped.place for dropped in found.dropped)


@given(st.binary(max_size=200), st.sampled_from(["x.jsonl", "x.jsonl.gz", "x.json", "x.csv", "x.parquet"]))
@settings(max_examples=200, deadline=None)
@pytest.mark.fault("random files", promise="P4")
def test_random_files_end_in_rows_faults_or_a_refusal(tmp_path_factory, content, name):
    file = tmp_path_factory.mktemp("random") / name
    file.write_bytes(content)
    try:
        assert all(isinstance(item, Row | Fault) for item in read_source(str(file), "train"))
    except DataError as error:
        assert str(file) in str(error) and Path(file).name in str(error)
