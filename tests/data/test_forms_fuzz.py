"""Rows of every form with random faults in them: each is trained on, or counted with its place and reason."""

import copy
import csv
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_kit.cli.plan import plan_run
from dpo_kit.config.compose import check as checked
from dpo_kit.config.compose import compose
from dpo_kit.data.curate.convert import convert
from dpo_kit.data.gather import read_rows, sources
from dpo_kit.data.options import Convert
from dpo_kit.data.published import best_and_worst
from dpo_kit.data.read import Fault, Row
from dpo_kit.errors import DataError, DpoKitError
from dpo_kit.run.files import write_json
from tests.data.test_files import files
from tests.data.test_forms import FORM_ROWS
from tests.preferences import data, labels, pairs, prepared, report

JUNK = (
    *(None, "", " \n", "\u200b", "x", "[{'role': 'user'", '[{"role": 1}]', "{", "Human: a\n\nAssistant: b"),
    *(0, -1, 1.5, float("inf"), 10**400, True, False, [], {}, [[]], [None], [1, "a"], {"role": "user"}),
    *([{"role": "assistant"}], [{"role": None, "content": None}], [{"content": "x"}], [{"from": ["gpt"], "value": {}}]),
    *([{"role": "user", "content": [{"type": "image"}]}], [{"role": "tool_call", "content": "no"}], "a" * 5000),
    *([{"role": "assistant", "content": "x", "tool_calls": "x", "function_call": {"name": 1}}], {"1": {"2": {"3": 4}}}),
)  # fmt: skip
WORDS = ["lamp", "bulb", "Wärme", "光", "שלום", "🙂", "<|im_end|>", "<think>", "{{x}}", "\\d", *"'\"[{;,|\t"]
EXTRA = [  # what has no form of its own in training: a row with its form's kind
    {"prompt": "My lamp flickers.", "response": "Swap the bulb.", "score": 3.5},
    {"question": "My lamp flickers."},
]


def varied(value, rng, number):
    """`value` with other texts, so that rows differ; the number keeps prompts apart."""
    if isinstance(value, dict):
        return {key: varied(item, rng, number) for key, item in value.items()}
    if isinstance(value, list):
        return [varied(item, rng, number) for item in value]
    if isinstance(value, str) and (end := next((end for end in ("flickers.", "is it?", "now?") if end in value), None)):
        return value.replace(end, f"{end[:-1]} {number}{end[-1]}")
    if isinstance(value, str) and value in ("Swap the bulb.", "Live with it."):
        return f"{value} {' '.join(rng.choices(WORDS, k=rng.randrange(6)))}".strip()
    return value


def spoilt(row, rng):
    """`row` with one to three faults, at any depth."""
    row = copy.deepcopy(row)
    for _ in range(rng.randrange(1, 4)):
        holder, key = rng.choice(list(places(row)))
        way = rng.randrange(4)
        if way == 0:
            del holder[key]
        elif way == 1:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"value": holder[key]}
        else:
            holder[key] = copy.deepcopy(rng.choice(JUNK))
        if not row:
            return {"nothing": None}
    return row


def places(value):
    """(dict or list, key or index) of everything in `value`; of lists from the end, so that deleting is safe."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def cases(count, seed):
    """(rows, their generator) of every form: `count` rows each, three in ten of them spoilt, the first twelve never."""
    for number, row in enumerate([*(param.values[1] for param in FORM_ROWS), *EXTRA]):
        rng = random.Random(f"{seed} {number}")
        rows = [varied(row, rng, number) for number in range(count)]
        for number, made in enumerate(rows):
            made |= {tag: number % 3 > 0 for tag in ("label", "kto_tag") if isinstance(made.get(tag), bool)}
            if number >= 12 and rng.random() < 0.3:
                rows[number] = spoilt(made, rng)
        yield rows, rng


def write(folder, rows, rng):
    """The rows as a file of any kind that can hold them; its path and how many rows it has."""
    kind = rng.choice(["jsonl", "json", "csv", "tsv", "parquet"])
    names = list(dict.fromkeys(name for row in rows for name in row))
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        try:
            pq.write_table(pa.Table.from_pylist(rows), path)
            return str(path)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            path = folder / "rows.jsonl"
    if kind == "json":
        path.write_text(json.dumps(rows, indent=rng.choice([None, 1])))
    elif kind in ("csv", "tsv"):
        as_text = rng.choice([json.dumps, str])
        with path.open("w", newline="") as file:
            table = csv.DictWriter(
                file, names, delimiter="\t" if kind == "tsv" else rng.choice(",;"), quoting=csv.QUOTE_ALL
            )
            table.writeheader()
            for row in rows:
                table.writerow({k: as_text(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    else:
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def check(folder, count, seed, trained):
    """How many rows were read: by mode=convert each form alone, in training all of each kind in `trained` together."""
    files = {"pairs": [], "unary": [], "prompts": []}
    total = 0
    for number, (rows, rng) in enumerate(cases(count, seed)):
        (folder / str(number)).mkdir()
        file = write(folder / str(number), rows, rng)
        kind = check_convert(file, len(rows))
        files.get({"scored": "pairs"}.get(kind, kind), []).append(file)  # rated: refused in training
        total += len(rows)
    for kind in trained:
        check_training(files[kind], kind, count * len(files[kind]))
    return total


def check_training(files, kind, count):
    found = prepared(files, wanted=kind, on_bad_row="drop", wrap_as_chat=True)
    assert found.report["rows_read"] == count and len(found.train) > 12
    assert kind == "prompts" or sum(found.report["rows"].values()) == count
    assert all(fault.reason and fault.place.startswith(tuple(files)) for fault in found.dropped)
    assert sum(found.report["dropped_by_reason"].values()) == len(found.dropped)


def check_convert(file, count):
    faults = []
    (source,) = sources(data(file).train)
    match, rows = read_rows(source, "train", data(file), faults, bare=True)
    assert len(rows) + len(faults) == count and all(fault.reason and fault.place for fault in faults)
    if match.form.rows == "scored":
        assert all(isinstance(best_and_worst(row), Row | Fault) for row in rows)
    for options in (Convert(), Convert(to="unary", threshold=0.5), Convert(pairing="all", min_gap=0.5)):
        found = convert([(match.form, rows)], options, 0) if match.form.rows != "prompts" else None
        assert found is None or found.used | {fault.place for fault in found.faults} == {row.place for row in rows}
    return match.form.rows


def test_rows_of_every_form_with_random_faults_are_kept_or_counted(tmp_path):
    assert check(tmp_path, 20, seed=0, trained=()) > 900


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault("100,000 rows of every form, three in ten of them spoilt", promise="P4")
def test_a_hundred_thousand_rows_of_every_form_are_kept_or_counted(tmp_path):
    assert check(tmp_path, 100_000 // len(FORM_ROWS) + 1, seed=1, trained=("pairs", "unary", "prompts")) > 100_000


# --- whole files ---------------------------------------------------------------------------------------------------

PIECES = (
    *(b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"\r", b"\r\n\r\n", b'"', b"'", b"\\", b"\\ud83d"),
    *(b"{", b"}", b"[", b"]", b",", b";", b"\t", b":", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"null"),
    *(b"[" * 990, b'{"a":' * 900, b'"prompt": ', b'"chosen": "x", ', b"\n\n{}\n", "\u2028".encode(), b"a" * 140_000),
)  # fmt: skip


def damaged(content, rng):
    """`content` with one to three pieces cut, doubled, overwritten or put in."""
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = start + rng.choice((1, 1, 8, 200, len(content)))
        new = rng.choice((b"", content[start:end] * 2, rng.randbytes(min(end - start, 300)), rng.choice(PIECES)))
        content = content[:start] + new + content[rng.choice((start, end)) :]
    return content


def placed(folder, name, content, rng):
    """The file's path, some under another kind's name; or its folder, of a split or with whole rows beside."""
    way, ending = rng.randrange(8), "".join(name.partition(".")[1:])
    if way == 0:
        name = "other" + rng.choice([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz", ".json.zst"])
    elif way == 1:
        name = f"data/train-00000-of-00001{ending}"
    elif way == 2:
        (folder / "whole.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(20, seed=rng.random())))
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return str(folder if way in (1, 2) else path)


def try_files(folder, count, seed, size, plans):
    """How many damaged files were read: each ends in rows and faults, or in one sentence that can be printed."""
    outcomes = {"read": 0, "refused": 0}
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        wanted, rows = rng.choice([("pairs", pairs), ("unary", labels)])
        name, content = rng.choice([*files(rows(size, seed=number)).items()])
        (folder / str(number)).mkdir()
        path = placed(folder / str(number), name, damaged(content, rng), rng)
        options = {"on_bad_row": rng.choice(["fail", "drop"]), "wrap_as_chat": False}  # no template is tried
        try:
            found = [prepared(path, wanted=wanted, **options).report]
            found += [report(path, **options)] if wanted == "pairs" else []
            write_json(folder / "report.json", found)
            outcomes["read"] += 1
        except DataError as error:
            assert str(error).encode().strip()
            outcomes["refused"] += 1
        if number < plans:
            method = {"pairs": "dpo", "unary": "kto"}[wanted]
            words = ["data=jsonl", f"data.train={path}", f"method={method}", "data.on_bad_row=drop", "data.gold=null"]
            try:
                plan_run(checked(compose(words)))
            except DpoKitError as error:
                assert str(error).encode().strip()
    return outcomes


def test_damaged_files_of_every_kind_are_read_or_refused_in_a_sentence(tmp_path):
    assert min(try_files(tmp_path, 12, seed=0, size=20, plans=0).values()) > 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.fault("100,000 rows in damaged files of every kind", promise="P4")
def test_a_hundred_thousand_rows_in_damaged_files_are_read_or_refused(tmp_path):
    assert min(try_files(tmp_path, 2000, seed=1, size=50, plans=100).values()) > 300
