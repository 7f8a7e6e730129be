"""The table, the files, the pictures and the command that sum up a sweep."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.text
import pytest
from PIL import Image
from rich.console import Console

from dpo_kit.config.compose import check, compose
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.run.files import write_json
from dpo_kit.run.report.drawing import spread
from dpo_kit.sweep.__main__ import main
from dpo_kit.sweep.choice.runs import sweep_command
from dpo_kit.sweep.summary import describe, show_summary, summarize, write_summary
from dpo_kit.trainer.manifest import comparable
from tests.sweeps import rewards, write_evaluation, write_jobs, write_run

START = rewards(0.2, 64)
FILES = {"summary.csv", "summary.md", "best.json", "frontier.png", "curves.png"}


def four(sweep: Path, method: str = "dpo", **more: Any) -> Path:
    """A sweep over four betas in which quality and drift fall with beta."""
    for number, (beta, mean, kl) in enumerate([(0.05, 1.6, 7.0), (0.1, 1.6, 5.0), (0.2, 1.5, 4.0), (0.5, 1.2, 2.0)]):
        write_run(
            sweep, f"{number}-{method}-beta{beta:g}", method=method, beta=beta, kl=kl, gold_start=START,
            gold=rewards(mean, 64, seed=number), margins=[1.0] * 70 + [-0.5] * 30, **more,
        )  # fmt: skip
    return sweep


def table(sweep: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((sweep / "summary.csv").open()))


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of each picture drawn, in the order drawn."""
    shown: list[list[str]] = []
    save = matplotlib.figure.Figure.savefig

    def look(figure: Any, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)
        shown.append([item.get_text().strip() for item in figure.findobj(matplotlib.text.Text) if item.get_text()])

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", look)
    return shown


def test_the_summary_of_a_sweep_is_five_files_and_reading_it_writes_none(tmp_path: Path) -> None:
    four(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    first = summarize(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before
    write_summary(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before | FILES
    kept = {name: (tmp_path / name).read_bytes() for name in FILES}
    assert summarize(tmp_path).rows == first.rows  # its own files are no runs
    write_summary(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == kept


def test_a_row_of_the_table_holds_what_the_run_measured_and_missing_stays_empty(tmp_path: Path) -> None:
    four(tmp_path)
    write_summary(tmp_path)
    row = table(tmp_path)[1]
    expected = {"method": "dpo", "beta": "0.1", "seed": "0", "tuning": "full", "status": "done", "seconds": "12.5"}
    expected |= {"path": "1-dpo-beta0.1", "error": "", "auc": "", "win_rate": "", "capability": "", "displacement": ""}
    assert {key: row[key] for key in expected} == expected
    numbers = {
        "accuracy": 0.7,
        "margin_nats": 0.55,
        "kl_reverse_nats": 5.0,
        "kl_reverse_nats_se": 0.2,
        "gold_reward": 1.6,
    }
    numbers |= {"kl_forward_nats": 6.0, "sample_tokens": 20, "saturation": 0.5}
    assert {key: float(row[key]) for key in numbers} == pytest.approx(numbers)
    assert row["kl_forward_nats_se"] == ""
    assert float(row["accuracy_low"]) < 0.7 < float(row["accuracy_high"])
    assert float(row["gold_reward_low"]) < 1.6 < float(row["gold_reward_high"])


def test_the_length_follows_from_the_drift_where_answers_are_not_recorded_by_prompt(tmp_path: Path) -> None:
    four(tmp_path, by_prompt=False)
    write_summary(tmp_path)
    assert [float(row["sample_tokens"]) for row in table(tmp_path)] == pytest.approx([20] * 4)  # KL / KL per token


def test_rows_are_sorted_by_method_beta_and_seed_as_numbers(tmp_path: Path) -> None:
    for name, method, beta, seed in (
        ("a", "ipo", 0.1, 0),
        ("b", "dpo", 10.0, 0),
        ("c", "dpo", 2.0, 1),
        ("d", "dpo", 2.0, 0),
    ):
        write_run(tmp_path, name, method=method, beta=beta, seed=seed)
    assert [row["path"] for row in summarize(tmp_path).rows] == ["d", "c", "b", "a"]


def test_other_swept_keys_are_columns_and_lines_of_their_own(tmp_path: Path, texts: list[list[str]]) -> None:
    for name, rate in (("a", 1e-4), ("b", 3e-4)):
        write_run(tmp_path, name, gold=rewards(1.0, 64), gold_start=START, trl={"learning_rate": rate, "beta": 0.1})
    write_summary(tmp_path)
    assert [row["trl.learning_rate"] for row in table(tmp_path)] == ["0.0001", "0.0003"]
    assert "dpo, learning_rate 0.0001" in texts[0] and "trl.beta" not in table(tmp_path)[0]


def test_what_was_typed_names_the_swept_keys_where_it_is_known(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path, name)
    jobs = ({"dir": n, "state": "done", "overrides": [f"data={d}", "seed=0"]} for n, d in (("a", "toy"), ("b", "mine")))
    write_jobs(tmp_path, *jobs)
    assert [row["data"] for row in summarize(tmp_path).rows] == ["toy", "mine"]
    assert "method.name" not in summarize(tmp_path).rows[0]


def test_a_failed_run_is_listed_with_its_error_and_log(tmp_path: Path) -> None:
    four(tmp_path)
    write_run(tmp_path, "4-bad", beta=1.0, status="failed", error="RuntimeError: out of memory\nmore | lines")
    write_jobs(
        tmp_path,
        {"dir": "4-bad", "state": "failed", "log": "4-bad/job.log", "seconds": 3.0},
        {"dir": "5-killed", "state": "killed", "method": "dpo", "beta": 2.0, "seed": 0, "error": "killed by signal 9"},
        typed=["beta-sweep=standard", "hub_token=swordfish"],
    )
    found = write_summary(tmp_path)
    bad, killed = table(tmp_path)[4:]
    assert (bad["status"], bad["gold_reward"], bad["seconds"]) == ("failed", "", "3.0")
    assert bad["error"].startswith("RuntimeError: out of memory")
    assert (killed["status"], killed["path"], killed["error"]) == ("killed", "5-killed", "killed by signal 9")
    assert f"4-bad failed: RuntimeError: out of memory (log: {tmp_path}/4-bad/job.log)" in describe(found)
    typed = "beta-sweep=standard 'hub_token=<redacted>' hydra.sweep.dir=swept"
    again = f"python -m dpo_kit -m '--config-dir=/my options' {typed}"
    page = (tmp_path / "summary.md").read_text()
    assert found.next == again and page.count(again) == 2 and "swordfish" not in page
    assert "more \\| lines" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    "cut", ["", "hydra:\n", "hydra:\n  overrides:\n    task: [a", "hydra: {overrides: {task: []}}", "- a"]
)
def test_a_cut_record_of_the_command_costs_the_command_only(tmp_path: Path, cut: str) -> None:
    (tmp_path / "multirun.yaml").write_text(cut)
    assert sweep_command(tmp_path) is None


@pytest.mark.parametrize(
    ("result", "job", "status"),
    [
        (None, None, "running or killed"),
        ("interrupted", None, "interrupted"),
        (None, "timed out", "timed out"),
        ("done", "running", "done"),  # the launcher died before it could note the end
        ("failed", "running", "running"),  # tried again
    ],
)
def test_the_state_of_a_run(tmp_path: Path, result: str | None, job: str | None, status: str) -> None:
    write_run(tmp_path, "a", status=result)
    if job:
        write_jobs(tmp_path, {"dir": "a", "state": job})
    assert summarize(tmp_path).rows[0]["status"] == status


def test_a_broken_file_of_one_run_spares_the_others(tmp_path: Path) -> None:
    four(tmp_path)
    (tmp_path / "0-dpo-beta0.05" / "result.json").write_text('{"status": "do')
    (tmp_path / "1-dpo-beta0.1" / "metrics.jsonl").write_text("no json\n{}\n")
    (tmp_path / "sweep.json").write_text("[")
    found = write_summary(tmp_path)
    broken = next(row for row in found.rows if row["path"] == "0-dpo-beta0.05")
    assert "result.json cannot be read" in broken["error"] and broken["accuracy"] is None
    assert found.recommended is not None and len(found.rows) == 4


def test_best_json_holds_what_the_contract_names(tmp_path: Path) -> None:
    write_summary(four(tmp_path))
    best = json.loads((tmp_path / "best.json").read_text())
    assert {"recommended", "rule", "evidence", "reason", "provisional", "needed"} <= best.keys()
    assert (tmp_path / best["recommended"] / "manifest.json").exists()
    assert f"**{best['recommended']}**" in (tmp_path / "summary.md").read_text()


def test_the_pictures_are_1200_pixels_wide_and_name_what_they_show(tmp_path: Path, texts: list[list[str]]) -> None:
    four(four(tmp_path), method="ipo")
    found = write_summary(tmp_path)
    for name in ("frontier.png", "curves.png"):
        picture = Image.open(tmp_path / name).convert("L")
        assert picture.width == 1200 and picture.getextrema() == (0, 255)
    frontier, curves = texts
    for text in (
        "dpo",
        "ipo",
        "β 0.05",
        "β 0.5",
        "reference",
        "recommended",
        "KL budget 10",
    ):
        assert text in frontier, text
    assert frontier.count("β 0.05") == 2 and found.recommended is not None
    for text in ("dpo", "ipo", "β 0.05", "Preference margin (nats)", "KL drift (nats per answer)", "100 pairs"):
        assert text in curves, text
    assert "gold reward of fresh samples (64 prompts)" in frontier and "nothing recommended" not in " ".join(frontier)


def test_the_frontier_names_each_beta_once_over_seeds_and_a_far_budget_is_left_out(
    tmp_path: Path, texts: list[list[str]]
) -> None:
    for seed in (0, 1, 2):
        write_run(
            tmp_path, f"s{seed}", seed=seed, gold=rewards(1.0, 64, seed=seed), gold_start=START, kl=2.0, kl_se=0.1
        )
    write_summary(tmp_path)
    assert texts[0].count("β 0.1") == 1 and not any("budget" in text for text in texts[0])


def test_a_choice_by_accuracy_alone_is_marked_in_the_picture(tmp_path: Path, texts: list[list[str]]) -> None:
    write_run(tmp_path, "a", margins=[1.0] * 80 + [-1.0] * 20)
    write_summary(tmp_path)
    assert "recommended\n(provisional)" in texts[0] and "accuracy on held-out pairs (100 pairs)" in texts[0]


def test_runs_of_two_models_have_a_panel_each(tmp_path: Path, texts: list[list[str]]) -> None:
    write_run(tmp_path, "a", gold=rewards(1.0, 64), gold_start=START)
    other = {"path": "org/other", "revision": "main", "sha256": None}
    write_run(tmp_path, "b", gold=rewards(1.0, 64), gold_start=START, model=other)
    write_summary(tmp_path)
    titles = [text for text in texts[0] if text.startswith("Quality")]
    assert titles == ["Quality against drift, from model", "Quality against drift, from other"]


def test_each_panel_marks_the_run_recommended_within_its_model(tmp_path: Path, texts: list[list[str]]) -> None:
    for name, status in (("a", None), ("b", "done"), ("c", "done")):  # of the first model no run has ended
        model = {"path": f"org/{name}", "revision": "main", "sha256": None}
        write_run(tmp_path, name, gold=rewards(1.0, 64), gold_start=START, model=model, status=status)
    write_summary(tmp_path)
    assert texts[0].count("recommended") == 2


def test_predictions_are_drawn_as_such_and_the_ideal_where_it_is_known(tmp_path: Path, texts: list[list[str]]) -> None:
    four(tmp_path)
    points = [{"beta": b, "probe/kl_reverse_rb_nats": kl, "gold/reward": 1.0} for b, kl in ((0.2, 4.1), (1.0, 1.5))]
    write_json(tmp_path / "1-dpo-beta0.1" / "preview.json", {"from_beta": 0.1, "points": points})
    ideal = {"ideal": [[0, 0.2], [4, 2.0], [8, 2.5]], "best_of_n": [[4, 0.6, 0.9], [1000, 5.9, 2.0]]}
    write_json(tmp_path / "ideal.json", ideal)
    write_summary(tmp_path)
    assert "β 1 predicted" in texts[0] and "β 0.2 predicted" not in texts[0] and texts[0].count("β 0.2") == 2
    assert "ideal" in texts[0] and "best of 1000" in texts[0]
    write_json(tmp_path / "ideal.json", ideal | {"model_sha256": "of other weights"})
    texts.clear()
    write_summary(tmp_path)
    assert "ideal" not in texts[0]
    (tmp_path / "elsewhere.json").write_text('{"ideal": [[1]]}')
    with pytest.raises(DataError, match="best_of_n"):
        write_summary(tmp_path, ideal=tmp_path / "elsewhere.json")


@pytest.mark.parametrize("status", [None, "failed"])
def test_a_sweep_without_a_finished_run_has_pictures_that_say_so(
    tmp_path: Path, texts: list[list[str]], status: str | None
) -> None:
    write_run(tmp_path, "a", status=status)
    write_summary(tmp_path)
    assert "no finished run has a quality and a reverse KL yet" in texts[0]
    (tmp_path / "a" / "metrics.jsonl").unlink()
    write_summary(tmp_path)
    assert "no run has measured anything yet" in texts[3]


def test_the_picture_counts_the_runs_it_lacks(tmp_path: Path, texts: list[list[str]]) -> None:
    four(tmp_path)
    write_run(tmp_path, "failed", status="failed", error="no")
    write_jobs(tmp_path, {"dir": "waiting", "state": "waiting"})
    write_summary(tmp_path)
    assert any(text.startswith("4 of 6 runs so far · bars") for text in texts[0])


def test_labels_are_spread_and_stay_within_the_axes() -> None:
    placed = spread([1.0, 1.0, 0.99, 5.0], 0.5, 0.0, 1.2)
    assert placed[2] < placed[0] < placed[3] and max(placed) <= 1.2 + 0.5
    order = sorted(spread([3.0, 3.0, 3.0], 1.0, 0.0, 10.0))
    assert order == pytest.approx([2.0, 3.0, 4.0], abs=1e-3)
    assert spread([1.0, 9.0], 1.0, 0.0, 10.0) == [1.0, 9.0]


def test_the_terminal_shows_table_choice_and_next_command_in_eighty_columns(tmp_path: Path) -> None:
    four(tmp_path, capability=0.9)
    console = Console(width=80, file=io.StringIO())
    found = show_summary(tmp_path, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown and "→" in shown
    assert re.search(r"┃ +reverse ┃", shown)  # KL: the live table shows the forward one
    assert f"Recommended: {found.recommended}." in shown and "next: python -m dpo_kit -m" in shown


def test_without_a_choice_the_reason_is_shown_and_no_model(tmp_path: Path) -> None:
    write_run(tmp_path, "a", gold=rewards(0.0, 64), gold_start=START)
    lines = describe(show_summary(tmp_path, console=Console(file=io.StringIO())))
    assert lines[0].startswith("Nothing recommended. No run is eligible.")
    assert not any(line.startswith("model:") for line in lines)


def run_main(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from dpo_kit.sweep.__main__ import main; code = main(); print('torch' in sys.modules); exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=os.environ | {"COLUMNS": "100"}, capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    four(tmp_path / "sweep")
    done = run_main("sweep=sweep", "choose.kl_budget_nats=4.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Recommended: 2-dpo-beta0.2" in done.stdout and done.stdout.endswith("False\n")
    assert "at most 4.5 nats" in (tmp_path / "sweep" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=SWEEP", "choose.kl_budget=3"], "unknown key choose.kl_budget; did you mean choose.kl_budget_nats?"),
        (["sweep=SWEEP", "test=yes"], "test must be true or false, got yes"),
        (["sweep=SWEEP", "zzz=3"], "the keys are sweep, test, ideal, choose.kl_budget_nats, choose.max_regression"),
        (["SWEEP"], "did you mean sweep="),
        ([], "sweep is missing: add sweep=DIR"),
        (["sweep=SWEEP/none"], "is not a folder"),
        (["sweep=SWEEP/0-dpo-beta0.05"], "holds no run (it is itself a run: give the folder above)"),
        (["sweep=SWEEP", "choose.kl_budget_nats=-1"], "choose.kl_budget_nats: input should be greater than 0, got -1"),
        (["sweep=SWEEP", "choose.max_regression=much"], "choose.max_regression: input should be a valid number"),
        (["sweep=SWEEP", "ideal=none.json"], "ideal=none.json: no such file"),
    ],
)
def test_wrong_arguments_are_refused_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    four(tmp_path)
    assert main([word.replace("SWEEP", str(tmp_path)) for word in arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(key in shown for key in ("sweep=", "choose.kl_budget_nats=", "choose.max_regression=", "ideal="))


def test_the_limits_stand_in_the_config_and_change_no_run() -> None:
    settings = check(compose(["choose.kl_budget_nats=5"]))
    assert settings.choose.model_dump() == {"kl_budget_nats": 5.0, "max_regression": 0.03}
    assert comparable(settings) == comparable(check(compose([])))
    with pytest.raises(ConfigError, match="max_regression"):
        compose(["choose.max_regression=2"])
    with pytest.raises(ConfigError, match=r"choose\.kl_budget_nats"):
        compose(["choose.kl_budget=2"])


# --- nothing that overstates ---------------------------------------------------------------------------------------

ROUNDED = {
    "probe/logratio_chosen_nats": 0.04, "probe/logratio_rejected_nats": -0.01, "probe/floor_nats": 0.6,
    "probe/kl_floor_nats": 0.06,
}  # fmt: skip


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The frontier and the curves as they were saved."""
    shown: list[Any] = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure: Any, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)
        shown.append(figure)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return shown


def sweep_of(folder: Path, betas: int, margins: list[float], kl: float = 3.0, **more: Any) -> Path:
    for number in range(betas):
        beta = 0.1 * (number + 1)
        write_run(folder, f"{number}", beta=beta, margins=margins, kl=kl / (number + 1), kl_se=0.001, **more)
    return folder


def texts_of(figure: Any) -> list[str]:
    return [item.get_text() for item in figure.findobj(matplotlib.text.Text) if item.get_text()]


def hatched(axes: Any) -> list[tuple[float, float]]:
    """The bands named rounding: from and to, upwards or to the right."""
    boxes = [patch.get_bbox() for patch in axes.patches if patch.get_hatch() and patch.get_label() == "rounding"]
    return [(box.x0, box.x1) if (box.y0, box.y1) == (0, 1) else (box.y0, box.y1) for box in boxes]


@pytest.mark.parametrize(("betas", "style"), [(2, "None"), (3, "-")])
def test_two_betas_are_not_joined_and_three_are(tmp_path: Path, figures: list[Any], betas: int, style: str) -> None:
    write_summary(sweep_of(tmp_path, betas, [1.0] * 80 + [-1.0] * 20))
    (axes,) = figures[0].axes
    ways = [line for line in axes.lines if len(line.get_xdata()) == betas and line.get_linewidth() == 2.6]
    assert [line.get_linestyle() for line in ways] == [style]
    assert [handle.get_linestyle() for handle in axes.get_legend().get_lines()] == [style]


def test_curves_show_what_compares_across_betas_with_intervals_and_counts(tmp_path: Path, figures: list[Any]) -> None:
    more = {"probe/reward_chosen": 0.3, "probe/reward_rejected": -0.4, "probe/logratio_chosen_nats": 3.0}
    more |= {"probe/logratio_rejected_nats": -4.0, "probe/logratio_chosen_nats_low": 2.0}
    more |= {"probe/logratio_chosen_nats_high": 4.0}
    write_summary(sweep_of(tmp_path, 2, [1.0] * 6 + [-1.0] * 2, measured=more))
    shown = texts_of(figures[1])
    assert "Log-ratio to the reference (nats)" in shown and not any("reward" in text.lower() for text in shown)
    assert "only 8 pairs · dashed: chance" in shown and "only 8 pairs · squares: rejected" in shown
    lines = [line for axes in figures[1].axes for line in axes.lines if line.get_marker() in ("o", "s")]
    assert len(lines) == 2 * (1 + 2 + 1 + 2)
    assert all(line.get_markerfacecolor() == "white" for line in lines[:8])  # of pairs; answers are not recorded here
    assert all(axes.collections for axes in figures[1].axes)
    starts = {line.get_xdata()[0] for line in figures[1].axes[0].lines if line.get_marker() == "o"}
    assert len(starts) == 2  # moved apart, so that the bars of two betas do not hide each other


def test_no_text_of_the_curves_stands_within_a_panel(tmp_path: Path, figures: list[Any]) -> None:
    write_summary(four(tmp_path))
    for axes in figures[1].axes:
        for text in (text for text in axes.texts if text.get_text()):
            box, panel = text.get_window_extent(), axes.bbox
            assert box.x0 >= panel.x1 or box.y0 >= panel.y1, text.get_text()


def test_where_nothing_is_recommended_the_frontier_says_so(tmp_path: Path, figures: list[Any]) -> None:
    write_summary(sweep_of(tmp_path, 2, [1.0] * 52 + [-1.0] * 48))
    assert any(text.startswith("nothing recommended · bars") for text in texts_of(figures[0]))
    assert not any(text.startswith("recommended") for text in texts_of(figures[0]))


def test_what_lies_below_the_floor_is_called_rounding_in_pictures_tables_and_the_choice(
    tmp_path: Path, figures: list[Any]
) -> None:
    found = write_summary(sweep_of(tmp_path, 2, [1.0] * 12 + [-1.0] * 9, kl=0.04, measured=ROUNDED))
    frontier, curves = figures
    assert hatched(frontier.axes[0]) == [(0.0, 0.06)] and frontier.axes[0].get_xlim()[1] > 0.06
    assert {"β 0.1 (rounding)", "β 0.2 (rounding)"} <= set(texts_of(frontier))
    assert any(text.endswith("hatched: rounding") for text in texts_of(frontier))
    assert [hatched(axes) for axes in curves.axes] == [[(-0.6, 0.6)], [(-0.6, 0.6)], [], [(0.0, 0.06)]]
    row = table(tmp_path)[0]
    assert row["rounding"] == "accuracy, margin_nats, kl_forward_nats, kl_reverse_nats, saturation"
    assert (row["floor_nats"], row["kl_floor_nats"], row["held_out_rows"]) == ("0.6", "0.06", "21")
    page = (tmp_path / "summary.md").read_text()
    assert "0.571 (rounding) [" in page and "0.04 (rounding) ± 0.00" in page and "0.600" in page
    console = Console(width=80, file=io.StringIO())
    show_summary(tmp_path, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.split("Nothing")[0].count("rounding") == 4 and "0.571" not in shown.split("Nothing")[0]
    assert found.choice.recommended is None and "does not beat" not in found.choice.reason
    assert "the held-out accuracy is rounding (held-out answers have moved by 0.04 nats" in found.choice.reason
    notes = " ".join(found.choice.notes)
    assert "say nothing of beta" in notes and "no drift is told" in notes and "Under-trained" not in notes


def test_a_row_of_the_table_has_what_evaluate_found_where_the_choice_reads_it(tmp_path: Path) -> None:
    write_run(tmp_path, "a", margins=[1.0] * 12 + [-1.0] * 9)
    write_evaluation(tmp_path / "a", [1.0] * 160 + [-1.0] * 40)
    write_summary(tmp_path)
    assert (table(tmp_path)[0]["accuracy"], table(tmp_path)[0]["held_out_rows"]) == ("0.8", "200")
