"""report.md: what the files of a run say, on one page, and nothing that stands in them does anything there."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from dpo_kit.run.files import write_json
from dpo_kit.run.report.markdown import code, fence, inline, table
from dpo_kit.run.report.page import refresh_page, write_page
from tests.run.test_card import CANARY, MANIFEST, RESULT

DONE: dict[str, Any] = RESULT | {
    "status": "done",
    "seconds": {"train": 12.5},
    "next": "python -m dpo_kit -m method=ipo beta=0.1,0.2",
    "final": RESULT["final"] | {"gold/reward_low": 1.5, "gold/reward_high": 1.7},
}
RECORD: dict[str, Any] = MANIFEST | {
    "config_hash": "d91c8e97181959cc",
    "effective_batch": 16,
    "git": None,
    "machine": {"device": "cpu", "dtype": "float32", "world_size": 2},
}
REPORT = {
    "rows_read": 1500,
    "forms": {"orca.jsonl": "pairs (question, chosen, rejected)"},
    "dropped_by_reason": {"prompt is too long": 3},
    "warnings": [{"what": "few rows", "why": "wide intervals", "do": "add rows"}],
}
JUDGED = {
    "opponent": "its reference",
    "split": "test",
    "parts": {"win_rate": "done", "gate": "skipped (no tasks)"},
    "win_rate": 0.61,
    "win_rate_low": 0.55,
    "win_rate_high": 0.67,
    "win_rate_verdict": "better",
    "win_rate_prompts": 200,
    "judge": {"controls_failed": ["pick me"]},
}
HOSTILE = "a](http://x) ![i](y) <img src=x> | `tick` **b** __u__ &amp; $x$ # h\n\n# heading\n```"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_json(tmp_path / "result.json", DONE)
    write_json(tmp_path / "manifest.json", RECORD)
    write_json(tmp_path / "data_report.json", REPORT)
    return tmp_path


def test_the_page_states_what_was_trained_on_what_and_how_to_repeat_it(run: Path) -> None:
    (run / "report.png").touch()
    page = write_page(run)
    assert page == (run / "report.md").read_text()
    for fact in [
        "# ipo · beta 0.2 · seed 3",
        "Identity Preference Optimization, lora tuning of `org/small-instruct` on 1,199 rows of",
        "| preference margin, nats | – | 4.50 | [4.00, 5.00] |",
        "Accuracy went 50% of the way",
        "![the measures over steps](report.png)",
        "**Nothing saturates.** Beta is not felt. Train longer.",
        "| train | 1,199 | `abc123` |",
        "Read: 1,500 rows, `orca.jsonl` as pairs (question, chosen, rejected). Dropped: prompt is too long 3.",
        "**few rows**: wide intervals; add rows",
        "python -m dpo_kit method=ipo beta=0.2 +trl.hub_token=<redacted>",
        "| config | `d91c8e97181959cc` |",
        "device cpu, dtype float32, world_size 2, 12.5 s of training",
        "trl 1.16.0",
        "```bash\npython -m dpo_kit -m method=ipo beta=0.1,0.2\n```",
    ]:
        assert fact in page, fact
    assert CANARY not in page and "swordfish" not in page


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ({}, "**Measured**: 1.60 [1.50, 1.70] gold reward of fresh samples."),
        ({"gold/reward": 1.2, "gold/reward_low": 1.0, "gold/reward_high": 1.4}, "samples, 1.20 [1.00, 1.40] at the st"),
        ({"gold/reward": 1.2}, "samples, 1.20 at the start."),
    ],
)
def test_gold_rewards_stand_side_by_side_without_a_verdict_that_their_intervals_cannot_give(
    run: Path, start: dict[str, float], said: str
) -> None:
    page = write_page(run, DONE | {"start": start})
    assert said in page and "Better" not in page and "Not separated" not in page


def test_a_gold_reward_without_an_interval_is_still_measured(run: Path) -> None:
    page = write_page(run, DONE | {"final": {"gold/reward": 1.6, "probe/accuracy": 0.7}})
    assert "**Measured**: 1.60 gold reward of fresh samples." in page and "nobody has judged" not in page


def test_where_nobody_has_judged_the_page_does_not_call_it_better(run: Path) -> None:
    final = {"probe/accuracy": 0.7, "probe/accuracy_low": 0.6, "probe/accuracy_high": 0.8}
    said = "**Not known to be better yet**: held-out accuracy 0.700 [0.600, 0.800], but nobody has judged its answers"
    assert said in write_page(run, DONE | {"final": final})


def test_an_evaluation_has_the_word_once_there_is_one(run: Path) -> None:
    write_json(run / "evaluation" / "result.json", JUDGED)
    page = write_page(run)
    assert "**Better**: win rate 0.610 [0.550, 0.670] against its reference, on 200 prompts." in page
    assert "| win rate, ties counting half | 0.610 | [0.550, 0.670] |" in page
    assert "**The judge failed these controls: pick me.**" in page and "gate skipped (no tasks)" in page


def test_the_test_split_is_told_apart_from_the_one_that_chose(run: Path) -> None:
    write_json(run / "test.json", {"probe/accuracy": 0.65, "probe/accuracy_low": 0.6, "probe/accuracy_high": 0.7})
    assert "no part in any choice: held-out accuracy 0.650 [0.600, 0.700]." in write_page(run)


def test_a_run_that_failed_before_its_manifest_has_a_page_with_the_reason(tmp_path: Path) -> None:
    identity = {key: RESULT[key] for key in ("method", "beta", "seed", "model", "tuning")}
    write_json(tmp_path / "result.json", identity | {"status": "failed", "error": "OSError: disk <b>full</b>"})
    assert "**Failed**: OSError: disk \\<b\\>full\\</b\\>" in write_page(tmp_path)


def test_a_page_that_cannot_be_written_is_logged_and_nothing_else_fails(run: Path, caplog: Any) -> None:
    (run / "data_report.json").write_text("{")
    assert refresh_page(run) is None and "could not be written" in caplog.text
    write_json(run / "data_report.json", REPORT)
    assert refresh_page(run) == (run / "report.md").read_text()


def test_the_same_files_give_the_same_page_in_another_folder(run: Path, tmp_path_factory: Any) -> None:
    other = tmp_path_factory.mktemp("moved") / "run"
    shutil.copytree(run, other)
    assert write_page(other) == write_page(run)


def test_the_published_run_is_beside_it_with_its_source(run: Path) -> None:
    figure = {"key": "probe/accuracy", "expected": [0.75, 0.78], "measured": 0.7}
    published = {"name": "x", "source": "some/repo", "expected_from": "cards", "differs": [], "figures": [figure]}
    page = write_page(run, DONE | {"published": published})
    assert "- probe/accuracy: 0.750 to 0.780 published (2 reports), 0.700 here: below." in page
    assert "Source: some/repo. Values: cards." in page


# --- texts from elsewhere ----------------------------------------------------------------------------------------


def _kinds(text: str) -> set[str]:
    found = MarkdownIt("commonmark").enable("table").parse(text)
    return {child.type for token in found for child in [token, *(token.children or [])]}


@pytest.mark.parametrize("text", [HOSTILE, "[a][b] [c]: http://x", "_e_ *e* ~~s~~", "\\](http://x)", "|" * 9])
def test_what_stands_in_a_line_does_nothing(text: str) -> None:
    shown = [child for token in MarkdownIt().parseInline(inline(text)) for child in token.children or []]
    assert {child.type for child in shown} == {"text"}
    assert "".join(child.content for child in shown) == " ".join(text.split())
    assert _kinds(f"so: {code(text)}") <= {"paragraph_open", "inline", "text", "code_inline", "paragraph_close"}
    cells = _kinds(table(("a", "b"), [(inline(text), code(text))]))
    assert "link_open" not in cells and "html_inline" not in cells and "em_open" not in cells


def test_commands_stay_readable() -> None:
    words = "python -m dpo_kit data mode=curate curate.min_gap=0 data.train=[a.jsonl, b.jsonl]"
    assert inline(words) == words


def test_no_text_gets_out_of_its_fence() -> None:
    assert _kinds(fence("a\n```\n# b\n````\n<c>")) == {"fence"}
    assert "hf_" not in inline(CANARY) + code(CANARY) + fence(CANARY)


def test_names_of_the_run_do_nothing_on_its_page(run: Path) -> None:
    hostile = RECORD | {"model": RECORD["model"] | {"path": HOSTILE}}
    write_json(run / "manifest.json", hostile)
    write_json(run / "data_report.json", REPORT | {"dropped_by_reason": {HOSTILE: 1}})
    kinds = _kinds(write_page(run, DONE | {"model": HOSTILE}))
    assert "link_open" not in kinds and "html_inline" not in kinds and "html_block" not in kinds
