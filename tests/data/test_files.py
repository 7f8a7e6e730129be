"""Where rows stand: folders of splits, saved data sets, patterns, packed and foreign files, names of the hub."""

import csv
import gzip
import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_kit.config.settings import Data
from dpo_kit.data.read import Fault, Row, read_source
from dpo_kit.errors import DataError
from tests.preferences import data, pairs, prepared, write_jsonl

ROWS = [{"a": 1}, {"a": 2}]


def read(path, split="train", config=None):
    return [item.values if isinstance(item, Row) else item for item in read_source(str(path), split, config)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train-00000-of-00001-0a1b2c.parquet", "test-00000-of-00001-0a1b2c.parquet"),
        ("training/0000.parquet", "eval/0000.parquet"),
        ("biased_train.jsonl", "biased_test.jsonl"),
    ],
)
def test_the_splits_that_files_name_are_obeyed(tmp_path, names):
    for name, rows in zip(names, (ROWS, [{"a": 3}]), strict=True):
        write(tmp_path / name, rows)
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    assert read(tmp_path) == ROWS and read(tmp_path, "test") == read(tmp_path, "evaluation") == [{"a": 3}]
    with pytest.raises(
        DataError, match=r"has the split test, train, not 'validation': say which with data.train_split"
    ):
        read(tmp_path, "validation")


def test_a_split_of_its_own_name_is_another_split(tmp_path):
    for name in ("train_prefs", "train_sft"):
        write(tmp_path / f"{name}-00000-of-00001.parquet", [{"a": name}])
    assert read(tmp_path, "train_prefs") == [{"a": "train_prefs"}]
    with pytest.raises(DataError, match=r"train_prefs, train_sft, not 'train'"):
        read(tmp_path)


def test_a_file_of_no_split_beside_files_of_one_is_refused_by_name(tmp_path):
    write(tmp_path / "pairs.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(DataError, match=r"and pairs.jsonl of none: name the files themselves, as in data.train=\["):
        read(tmp_path)


def test_hidden_files_and_folders_are_not_read(tmp_path):
    write(tmp_path / "pairs.jsonl", ROWS)
    for name in (".cache/huggingface/download/x.json", ".git/x.jsonl", "._pairs.jsonl"):
        write(tmp_path / name, [{"a": 9}])
    assert read(tmp_path) == ROWS


def test_folders_that_save_to_disk_wrote_are_read_with_all_their_shards_and_nothing_else(tmp_path):
    rows = [{"a": number} for number in range(10)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one", num_shards=2)
    write(tmp_path / "one" / "cache-0a1b.jsonl", [{"a": 99}])
    assert read(tmp_path / "one") == rows
    both = {"train_prefs": datasets.Dataset.from_list(rows), "test_prefs": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two", "train_prefs") == rows and read(tmp_path / "two", "test_prefs") == ROWS
    with pytest.raises(DataError, match=r"has the split test_prefs, train_prefs, not 'train'"):
        read(tmp_path / "two")


def test_an_arrow_file_is_read_in_both_of_arrow_s_formats(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    for name, opened in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        with opened(str(tmp_path / f"{name}.arrow"), table.schema) as sink:
            sink.write_table(table)
        assert read(tmp_path / f"{name}.arrow") == ROWS
    (tmp_path / "x.arrow").write_bytes(b"ARROW1 and no more")
    with pytest.raises(DataError, match=r"x.arrow cannot be read as Arrow"):
        read(tmp_path / "x.arrow")


def test_patterns_and_lists_of_files_are_read_in_order(tmp_path):
    for number, name in enumerate(("b.jsonl", "a.jsonl", "c.csv")):
        write(tmp_path / name, [{"a": number}])
    assert read(tmp_path / "*.jsonl") == [{"a": 1}, {"a": 0}]
    with pytest.raises(DataError, match=r"no file matches .*\*.parquet"):
        read(tmp_path / "*.parquet")
    files = [write_jsonl(tmp_path / f"{n}.jsonl", pairs(6, seed=n)) for n in (1, 2)]
    found = prepared(files)
    assert sum(found.report["rows"].values()) == 12
    assert [(source.path, source.weight) for source in data(files).train] == [(file, 1.0) for file in files]


PAIRS = pairs(6)
LINES = "".join(json.dumps(row) + "\n" for row in PAIRS)


def cells(rows, delimiter, end="\n"):
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def arrow(rows, write):
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    if write is pq.write_table:
        write(table, sink)
    else:
        with write(sink, table.schema) as file:
            file.write_table(table, max_chunksize=20)
    return sink.getvalue().to_pybytes()


def files(rows):
    """`rows` as the content of files of every kind, by name."""
    lines, whole = "".join(json.dumps(row) + "\n" for row in rows), json.dumps(rows)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        "tabs.tsv": cells(rows, "\t").encode(),
        "semicolons.csv": cells(rows, ";", "\r\n").encode(),
        "bars.csv": cells(rows, "|").encode(),
        "windows.csv": cells(rows, ",", "\r\n").encode("utf-16"),
        "excel.tsv": cells(rows, "\t").encode("utf-16"),
        "wide.jsonl": lines.encode("utf-32"),
        "wide.json": whole.encode("utf-16"),
        "marked.json": whole.encode("utf-8-sig"),
        "packed.json.gz": gzip.compress(whole.encode()),
        "packed.csv.gz": gzip.compress(cells(rows, ",").encode()),
        "packed.jsonl.zst": zstd(lines.encode()),
        "packed.json.zst": zstd(json.dumps(rows, indent=1).encode()),
        "UPPER.JSONL.GZ": gzip.compress(lines.encode()),
        "pretty.jsonl": json.dumps(rows, indent=2).encode(),
        "one_line.jsonl": whole.encode(),
        "lines.json": lines.encode(),
        "wrapped.json": json.dumps({"version": "1", "data": rows}, indent=1).encode(),
        "splits.json": json.dumps({"train": rows, "test": rows[:2]}).encode(),
        "columns.json": json.dumps(columns).encode(),
        "more_columns.json": json.dumps(columns | {"meta": [{"k": 1}] * len(rows)}).encode(),
        "rows.parquet": arrow(rows, pq.write_table),
        "file.arrow": arrow(rows, pa.ipc.new_file),
        "stream.arrow": arrow(rows, pa.ipc.new_stream),
    }


FILES = files(PAIRS)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_however_it_is_packed_encoded_parted_or_wrapped(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert [{key: row[key] for key in PAIRS[0]} for row in read(tmp_path / name)] == PAIRS


def test_rows_that_a_json_file_has_by_split_are_those_of_the_split(tmp_path):
    (tmp_path / "x.json").write_bytes(FILES["splits.json"])
    assert read(tmp_path / "x.json", "test") == PAIRS[:2]
    (tmp_path / "y.json").write_text(json.dumps({"train": PAIRS}))
    with pytest.raises(DataError, match=r"it has the lists train: data.train_split and data.eval_split say which"):
        read(tmp_path / "y.json", "test")


REFUSED = {
    "x.xlsx": (b"PK", r"unknown kind of file; known are .*save it as one of them"),
    "x.jsonl.zip": (b"PK", r"unknown kind of file"),
    "half.jsonl.zst": (zstd(LINES.encode() * 50)[:-20], r"the compressed file is cut or damaged from here on"),
    "none.json.gz": (b"no gzip", r"the compressed file is cut or damaged from here on"),
    "odd.jsonl": (b"\xff\xfe\x00", r"begins as utf-16 and is not"),
    "row.json": (json.dumps(PAIRS[0]).encode(), r"must hold one JSON list of rows"),
    "chat.json": (json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode(), r"must hold one JSON list"),
    "two.json": (json.dumps({"good": [{"a": 1}], "bad": [{"a": 1}]}).encode(), r"it has the lists good, bad"),
    "objects.json": (json.dumps(PAIRS[0], indent=1).encode() * 2, r"several objects over several lines"),
    "latin.csv": (
        "prompt;chosen;rejected;né\n".encode("latin-1"),
        r"latin.csv:1: the names of the columns are not UTF-8",
    ),
    "nan.json": (b'{"data": [{"a": NaN}]}', r"not strict JSON \(NaN is no JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_name_and_what_to_do(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        read(tmp_path / name)
    assert name in str(refusal.value)


def test_lines_that_are_no_row_a_line_say_what_to_do(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIRS[0], indent=1))
    assert "write each object on one line" in read(tmp_path / "a.jsonl")[0].remedy
    (tmp_path / "b.jsonl").write_bytes(LINES.encode("utf-16-le"))
    first = read(tmp_path / "b.jsonl")[0]
    assert isinstance(first, Fault) and "save it as UTF-8" in first.remedy


def test_names_of_the_hub_may_have_dots_and_a_configuration(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if config is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']")
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert read("someone/pairs-v1.5", "test", "a") == ROWS and asked == [("someone/pairs-v1.5", "a", "test")]
    with pytest.raises(DataError, match=r"Please pick one among .*; name one with data.config"):
        read("someone/pairs-v1.5")
    for missing in ("someone/pairs.jsonl", "./pairs-v1.5", "a/b/c", "pairs.json.gz"):
        with pytest.raises(DataError, match="no such file or folder"):
            read(missing)
    write(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(DataError, match=r"data.config=a means a data set of the hub, but pairs.jsonl is here"):
        read("pairs.jsonl", config="a")


def test_a_split_of_a_folder_is_held_out_and_each_source_may_say_its_form(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00001.parquet", pairs(9))
    write(tmp_path / "data" / "test-00000-of-00001.parquet", pairs(4, seed=1))
    found = prepared(str(tmp_path), eval_split="test")
    assert (len(found.train), len(found.select) + len(found.test)) == (9, 4)
    assert Data.model_fields["form"].default is None and data([{"path": "x", "form": "arena"}]).train[0].form == "arena"
