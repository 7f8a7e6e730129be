"""The benchmark for a GPU, as far as a CPU can try it: its options, its tables, its clock."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "benchmark"


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(FOLDER))
    try:
        import gpu
    finally:
        sys.path.remove(str(FOLDER))
    return gpu


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sise=5m"], "unknown: sise; did you mean size?"),
        (["size=5m,9b"], "size=9b is not one of 0.5b, 1.5b, 5m, 7b"),
        (["device=gpu"], "device=gpu is not one of cpu, cuda"),
        (["part=demo,trane"], "part=trane is not one of demo, four, function, train"),
        (["limit=8min"], "limit must be whole seconds, got 8min"),
        (["5m"], "options are key=value, got 5m"),
    ],
)
def test_a_mistyped_option_is_refused_by_name(gpu, words, said):
    with pytest.raises(SystemExit, match=said.replace("?", r"\?")):
        gpu.read_options(words)


def test_sizes_follow_from_the_device_and_each_row_has_a_name_of_its_own(gpu):
    options = gpu.read_options(["device=cuda"])
    assert options["size"] == "0.5b,1.5b,7b"
    assert gpu.read_options(["device=cpu"])["size"] == "5m"
    rows = [row for part in gpu.ENDS for process in gpu.part_rows(part, options)[0] for row in process]
    assert len({row["key"] for row in rows}) == len(rows) > 30
    assert {row["tuning"] for row in rows if row.get("size") == "7b"} == {"lora"}


CELL = {"size": "0.5b", "tuning": "full", "shape": "prompt-heavy", "outcome": "ran", "rows": 8, "accumulate": 1}
CELL |= {"steps": 10, "pairs": 80, "distinct": 40_000, "operations": 2e15, "checkpointing": False}
OURS = {"what": "ours", "arm": "ours", "key": "ours", "seconds": 4.0, "start": 5.0, "peak": 10 * 2**30}
OURS |= {"planned": 11 * 2**30, "reference": 1.0, "reference_pairs": 160, "reference_tokens": 80_000}
EQUAL = {"what": "stock", "arm": "equal", "key": "equal", "seconds": 9.0, "start": 1.0, "peak": 20 * 2**30}
CARD = {"key": "card", "what": "product", "outcome": "ran", "card": "NVIDIA X", "memory": 80 * 2**30, "size": 8192}
ROWS = [
    CARD | {"rate": 8e14, "torch": "2.11.0", "python": "3.12.1"},
    {"key": "imports dpo_kit", "what": "imports", "outcome": "ran", "seconds": 20.0},
    {"key": "imports TRL", "what": "imports", "outcome": "ran", "seconds": 15.0},
    CELL | OURS,
    CELL | EQUAL,
    CELL | EQUAL | {"arm": "stock", "key": "stock", "seconds": 18.0, "checkpointing": True},
    {"key": "dpo, QLoRA", "what": "method", "outcome": "failed", "why": "ImportError: no | bitsandbytes"},
    {"key": "export", "what": "tool", "outcome": "not tried", "why": "time"},
]


def rendered(gpu, rows):
    return gpu.render({"options": {"device": "cuda"}, "rows": {row["key"]: row for row in rows}})


def test_tables_render_from_recorded_rows_with_the_figures_that_follow_from_them(gpu):
    text = rendered(gpu, ROWS)
    assert (
        "One NVIDIA X (80.0 GiB), PyTorch 2.11.0, Python 3.12.1; a bf16 product of 8192³ reaches 800.0 TFLOP/s" in text
    )
    # 4 s, and half of the pass of 1 s over 160 pairs; 80 pairs and 40,000 tokens in 4.5 s; 2e15 / 4 s / 8e14;
    # the pass: 80,000 tokens a second against 10,000
    own = "| 4.50 | 17.78 | 8,889 | 0.625 | 10.0 | 11.0 | 80,000 (8.0 × training) | 10 × 8 (8 at a time) | off |"
    assert f"| 0.5b full, prompt-heavy | dpo_kit {own}" in text
    assert "| `trl dpo` as it comes | 18.00 | 4.44 | 2,222 | 0.139 | 20.0 | – |  | 10 × 8 (8 at a time) | on |" in text
    # four of 15 + 1 + 640 · 18 / 80 = 160 s, against 20 + 640 / 160 + 4 · (5 + 640 · 4 / 80) = 172 s
    assert "| 0.5b full, prompt-heavy | 4.00 | 2.00 | 3.72 | 0.50 |" in text
    assert "Imports took 20.0 s with dpo_kit, 15.0 s with TRL alone." in text
    assert r"| dpo, QLoRA | failed | ImportError: no \| bitsandbytes |" in text
    assert text.endswith("Not run, or stopped: export; several devices.\n")


def test_an_arm_that_did_not_run_says_why_and_has_no_ratio(gpu):
    text = rendered(gpu, [*ROWS[:5], {**ROWS[5], "outcome": "not tried", "why": "time"}])
    assert "| 0.5b full, prompt-heavy | `trl dpo` as it comes | not tried: time |" in text
    assert "| 0.5b full, prompt-heavy | – | 2.00 | – | 0.50 |" in text
    assert "One GPU" in rendered(gpu, [])


def test_the_probe_s_share_is_that_of_a_run_of_300_steps_evaluated_ten_times(gpu):
    probe = CELL | {"key": "probe", "what": "probe", "step": 0.25, "half_way": [16], "steps": 22}
    probe |= {"reference": 1.0, "reference_pairs": 160, "peak": None}
    spent = [("start", 0, 3.0), ("evaluation", 8, 1.0), ("TRL", 8, 0.5), ("evaluation", 16, 2.0), ("TRL", 16, 0.5)]
    text = rendered(gpu, [probe | {"spent": [*spent, ("evaluation", 24, 1.0), ("TRL", 24, 0.5), ("end", 24, 2.0)]}])
    # 3 + 9 + 2 + 2 = 16 s; 300 · (.25 + 8 / 160) + 10 · .5 = 95 s
    assert "the probe takes 16.8 % of the time of the rest" in text


def test_what_no_longer_fits_is_not_started_and_says_so(gpu, tmp_path):
    record = gpu.Record(tmp_path, {"device": "cpu"})
    rows = [{"key": "far", "what": "demo", "needs": 100}, {"key": "slow", "what": "imports", "who": "TRL", "needs": 0}]
    until = record.started + 1
    gpu.run_part([rows], 1, record, {"device": "cpu"}, tmp_path, until)
    kept = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert (kept["far"]["outcome"], kept["far"]["why"]) == ("not tried", "time")
    assert kept["slow"]["outcome"] in ("not tried", "stopped") and kept["slow"]["why"].endswith("time")


def test_a_process_that_dies_costs_its_row_alone(gpu, tmp_path):
    record = gpu.Record(tmp_path, {"device": "cpu"})
    rows = [{"key": name, "what": "demo"} for name in ("first", "second", "third")]
    process, waiting = Mock(returncode=-11, last="Segmentation fault"), []
    running = {process: rows}
    for line in ('ROW {"key": "first", "outcome": "ran"}', 'ROW {"key": "second", "outcome": "started"}', None):
        gpu.hear(process, line, running, waiting, record)
    kept = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [kept[key]["outcome"] for key in ("first", "second")] == ["ran", "failed"]
    assert kept["second"]["why"] == "its process ended with -11: Segmentation fault"
    assert waiting == [rows[2:]] and not running


@pytest.mark.slow
def test_it_runs_on_a_cpu_to_its_tables(tmp_path):
    words = [sys.executable, str(FOLDER / "gpu.py"), "size=5m", "limit=120", "part=train", f"out={tmp_path}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert kept["5m full prompt-heavy ours"]["outcome"] == kept["exactness"]["outcome"] == "ran"
    assert kept["exactness"]["apart"]["shared fp32"]["gradient"] < 1e-4
    assert (tmp_path / "gpu.md").read_text().count("| 5m full, prompt-heavy |") >= 3
    assert {row["outcome"] for row in kept.values()} <= {"ran", "stopped", "not tried"}
