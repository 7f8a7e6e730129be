"""`python -m dpo_kit data` as a user types it."""

import hashlib
import json
import random
import shutil

import pytest

from dpo_kit.data.__main__ import main
from dpo_kit.toy import EVAL, MODEL, TRAIN
from tests.preferences import labels, pairs, write_jsonl


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def tool(tmp_path, capsys):
    def run(*words):
        code = main(["model=tiny", f"out={tmp_path / 'out'}", *words])
        said = capsys.readouterr()
        return code, said.out + said.err, tmp_path / "out"

    return run


def test_check_reports_every_row_and_refuses_what_training_would_refuse(tool, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [*pairs(20), "{", pairs(1)[0]])
    code, said, out = tool("data=jsonl", f"data.train={file}")
    assert code == 2 and f"{file}:21: not JSON" in said and "rows: copies" in said
    report = json.loads((out / "data_report.json").read_text())
    assert report["rows_read"] == 22 == sum(report["rows"].values())
    assert [row["place"] for row in lines(out / "dropped_rows.jsonl")] == [f"{file}:21"]
    assert (out / "data_report.png").read_bytes().startswith(b"\x89PNG")
    code, said, _ = tool("data=jsonl", f"data.train={file}", "data.on_bad_row=drop")
    assert code == 0 and "next: " in said


def test_lengths_in_tokens_of_the_embedded_model_are_said_where_the_rows_are_not_its_own(tool, tmp_path):
    copy = shutil.copytree(MODEL, tmp_path / "model")
    rows = ("data=jsonl", f"data.train={write_jsonl(tmp_path / 'a.jsonl', pairs(20))}")
    own = ("data=jsonl", f"data.train={EVAL}")
    said = [tool(*words)[1] for words in (rows, own, (*rows, f"model.path={copy}"))]
    assert ["lengths are in tokens of the embedded model" in text for text in said] == [True, False, False]


def test_training_s_report_has_the_same_figures_but_the_slow_ones(tmp_path):
    from tests.preferences import prepared, report

    file = write_jsonl(tmp_path / "a.jsonl", [*pairs(20), pairs(1)[0]])
    quick, thorough = prepared(file, max_length=None).report, report(file)
    assert set(thorough) - set(quick) == {"near_duplicates", "near_contradictions", "diversity", "difficulty"}
    for key in ("rows_read", "tokens", "shortcuts", "copies", "contradictions", "longer_is_chosen", "size"):
        assert quick[key] == thorough[key], key


def curate(tool, file, *words):
    code, said, out = tool("mode=curate", "data=jsonl", f"data.train={file}", *words)
    assert code == 0, said
    return {
        name: (out / name).read_bytes()
        for name in ("curated.jsonl", "rejects.jsonl", "manifest.json", "data_report.json")
    }


def test_curation_is_repeatable_to_the_byte_and_blind_to_order(tool, tmp_path):
    rows = [row | {"agreement": 0.6 + 0.1 * (i % 5), "tokens": i} for i, row in enumerate(pairs(40))]
    rows += rows[:5]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    one, again = curate(tool, file), curate(tool, file)
    assert {name: hashlib.sha256(content).hexdigest() for name, content in one.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in again.items()
    }
    random.Random(0).shuffle(rows)
    shuffled = curate(tool, write_jsonl(tmp_path / "a.jsonl", rows))
    assert shuffled["curated.jsonl"] == one["curated.jsonl"]
    kept = [json.loads(line) for line in one["curated.jsonl"].splitlines()]
    assert all(row in rows for row in kept)  # as they stood in the file, other columns too
    manifest = json.loads(one["manifest.json"])
    assert manifest["outputs"]["curated.jsonl"]["sha256"] == hashlib.sha256(one["curated.jsonl"]).hexdigest()
    assert manifest["counts"]["read"] == 45 == manifest["counts"]["kept"] + sum(manifest["counts"]["left_out"].values())
    report = json.loads(one["data_report.json"])
    assert report["before"]["agreement"]["below_0.7"] > 0 == report["after"]["agreement"]["below_0.7"]
    assert all(sum(side["rows"].values()) == side["rows_read"] == 45 for side in report.values())
    assert report["before"]["copies"]["rows"] == 5 and report["after"]["copies"]["rows"] == 0


def test_the_reference_s_own_preference_is_reported_and_picks_the_hardest(tool, tmp_path):
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()[:60]]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    code, said, out = tool("data=toy", f"data.train={file}", f"data.eval={EVAL}", "data.reference_margin=true")
    assert code == 0 and "the reference prefers chosen" in said
    found = json.loads((out / "data_report.json").read_text())["reference"]
    assert found["pairs"] == 60 and 0 < found["accuracy_low"] < found["accuracy"] < found["accuracy_high"] < 1
    code, said, out = tool("mode=curate", "data=toy", f"data.train={file}", "curate.hardest=10")
    assert code == 0 and len(lines(out / "curated.jsonl")) == 10, said


def test_convert_writes_rows_that_train_and_the_rejects(tool, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [*labels(12), labels(1)[0] | {"label": 2}])
    code, said, out = tool("mode=convert", "data=jsonl", f"data.train={file}", "convert.schema=unary")
    assert code == 2 and f"{file}:13: label is not true or false" in said
    again = [row | {"completion": row["completion"][::-1], "label": not row["label"]} for row in labels(12)]
    file = write_jsonl(tmp_path / "a.jsonl", [*labels(12), *again, labels(1)[0] | {"label": 2}])
    words = ["data=jsonl", f"data.train={file}", "convert.schema=unary", "data.on_bad_row=drop"]
    code, said, out = tool("mode=convert", *words)
    assert code == 0, said
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert (counts["read"], counts["used"], counts["rejected"], counts["rows_made"]) == (25, 24, 1, 12)
    assert tool("data=jsonl", f"data.train={out / 'converted.jsonl'}")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pairs.jsonl"], "did you mean data=jsonl data.train=pairs.jsonl?"),
        (["mode=chek"], "mode: input should be 'check', 'curate', 'convert' or 'build', got 'chek'"),
        (["curate.min_agrement=0.8"], "did you mean curate.min_agreement or"),
        (["curate.min_agreement=7"], "curate.min_agreement: input should be less than or equal to 1, got 7"),
        (["curate.min_ratio=0"], "curate.min_ratio: input should be greater than 0, got 0"),
        (["data=jsonl"], "data.train is missing"),
        (["data=jsonl", "data.train=none.jsonl"], "data.train=none.jsonl: no such file or folder"),
        (["convert.schema=hh"], "convert.schema: input should be"),
        (["method=dop"], "method must be one of apo_zero, bco"),
        (["curate.balance_length=true"], "curate.balance_length=true does nothing with mode=check: take mode=curate"),
        (["mode=curate", "convert.to=unary"], "convert.to=unary does nothing with mode=curate: take mode=convert"),
        (["mode=build", "curate.per_source=3"], "curate.per_source=3 does nothing with mode=build: take mode=curate"),
        (["judge=human"], "judge=human does nothing with mode=check: take mode=build, or leave it out"),
    ],
)
def test_what_is_wrong_is_refused_with_the_remedy(tool, words, message):
    code, said, out = tool(*words)
    assert code == 2 and message in said and not out.exists()


def test_help_names_every_option(capsys):
    from dpo_kit.data.options import Convert, Curate

    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    fields = [*Curate.model_fields.items(), *Convert.model_fields.items()]
    assert [name for key, field in fields if f"  {(name := field.alias or key)}: " not in said] == []
    assert "data.benchmark" in said and "data.reference_margin" in said


def test_refusing_imports_neither_torch_nor_trl(command):
    import subprocess
    import sys

    code = (
        "import sys; from dpo_kit.data.__main__ import main\n"
        "assert main(['curate.min_agreement=7']) == 2 and main(['--help']) == 0\n"
        "assert not {'torch', 'trl', 'transformers', 'datasets', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
