"""The picture and the table hold what was measured, with intervals, and nothing else."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from rich.console import Console

from dpo_kit.run.files import write_jsonl
from dpo_kit.run.history import append_row
from dpo_kit.run.report.numbers import bounds, range_text
from dpo_kit.run.report.picture import PANELS, draw_report, shown_panels
from dpo_kit.run.report.results import ceiling_line, result_rows, result_table

PAIRS = {
    "probe/margin_nats": 4.0,
    "probe/margin_nats_low": 3.5,
    "probe/margin_nats_high": 4.5,
    "probe/logratio_chosen_nats": -1.0,
    "probe/logratio_rejected_nats": -5.0,
    "probe/reward_chosen": -0.1,
    "probe/reward_rejected": -0.5,
    "probe/accuracy": 0.73,
    "probe/accuracy_low": 0.69,
    "probe/accuracy_high": 0.77,
    "probe/kl_forward_rb_nats": 4.2,
    "probe/kl_forward_rb_nats_se": 0.25,
    "probe/kl_forward_k1_nats": 4.4,
    "probe/kl_reverse_rb_nats": 5.0,
}
GOLD = {"gold/reward": 1.6, "gold/reward_low": 1.5, "gold/reward_high": 1.7, "gold/capability": 0.91}


def history(final: dict[str, float], points: int = 5) -> list[dict[str, Any]]:
    """Every key rising evenly from 0 to its final value, with training rows between."""
    rows: list[dict[str, Any]] = [
        {"step": 100 * k, **{key: value * k / (points - 1) for key, value in final.items()}} for k in range(points)
    ]
    return [*rows, {"step": 450, "loss": 0.5, "probe/accuracy": None}]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for row in rows:
        append_row(folder / "metrics.jsonl", row)
    return folder


def titles(final: dict[str, float]) -> list[str]:
    return [panel.title for panel in shown_panels(history(final))]


def figure_of(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Figure:
    """The figure as it was saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)  # the ticks get their texts while they are drawn
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw_report(path, **options)
    return saved[-1]


def text_of(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """Every text that the picture shows."""
    return [item.get_text() for item in figure_of(path, monkeypatch, **options).findobj(Text) if item.get_text()]


def panel_of(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def drawn(axes: Axes) -> list[Any]:
    """The curves of a panel, without its levels."""
    return [line for line in axes.lines if line.get_marker() == "o"]


def hatched(axes: Axes) -> list[tuple[float, float]]:
    """The bands named rounding, from bottom to top."""
    boxes = (patch.get_bbox() for patch in axes.patches if patch.get_hatch() and patch.get_label() == "rounding")
    return [(box.y0, box.y1) for box in boxes]


def result(**changes: Any) -> dict[str, Any]:
    given = {"method": "dpo", "beta": 0.1, "steps": 300, "start": {"probe/accuracy": 0.5}, "final": PAIRS | GOLD}
    return given | changes


@pytest.mark.parametrize("final", [PAIRS, PAIRS | GOLD, {"probe/margin_nats": 1.0}, {}], ids=len)
def test_the_picture_is_1200_pixels_wide_and_not_empty(final: dict[str, float], tmp_path: Path) -> None:
    path = draw_report(write(tmp_path, history(final)), title="dpo")
    picture = Image.open(path).convert("L")
    assert path == tmp_path / "report.png" and picture.width == 1200
    low, high = picture.getextrema()
    assert (low, high) == (0, 255)


def test_every_panel_states_its_unit_or_what_is_counted() -> None:
    assert all("(" in panel.title or "on held-out" in panel.title or "Gold" in panel.title for panel in PANELS)


def test_what_was_not_measured_leaves_its_panel_out() -> None:
    assert [title.split()[0] for title in titles(PAIRS)] == ["Preference", "Implicit", "Accuracy", "KL"]
    assert [title.split()[0] for title in titles(PAIRS | GOLD)][-2:] == ["Gold", "Capability"]
    assert titles({"probe/auc": 0.7, "probe/class_gap_nats": 3.0}) == [
        "Class gap of log-ratios (nats)",
        "AUC on held-out answers",
    ]
    assert titles({}) == []


def test_a_method_without_an_implicit_reward_shows_its_log_ratios_instead() -> None:
    without = {key: value for key, value in PAIRS.items() if "reward" not in key}
    assert "Log-ratio to the reference (nats)" in titles(without)
    assert not any(title.startswith("Log-ratio") for title in titles(PAIRS))


def test_curves_carry_their_name_and_last_value_and_lines_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = text_of(write(tmp_path, history(PAIRS)), monkeypatch, title="dpo · beta 0.1", ceiling=0.869)
    for text in ["dpo · beta 0.1", "4.00", "chosen\n−0.10", "rejected\n−0.50", "0.73"]:
        assert text in shown, shown
    assert "dashed: chance · dotted: label ceiling 0.87" in shown
    assert "forward\n4.20" in shown and "reverse\n5.00" in shown
    assert sum(text.startswith("forward") for text in shown) == 1  # Rao-Blackwell stands, k1 is its check


def test_small_and_large_values_keep_their_leading_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"probe/reward_chosen": 0.0034, "probe/reward_rejected": -0.0093, "probe/margin_nats": 107.34}
    shown = text_of(write(tmp_path, history(given)), monkeypatch)
    assert "chosen\n0.003" in shown and "rejected\n−0.009" in shown and "107.3" in shown


def test_every_panel_covers_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"step": 0, "gold/reward": 0.2},
        {"step": 0, "probe/margin_nats": 0.0},
        {"step": 80, "probe/margin_nats": 1.0},
    ]
    shown = text_of(write(tmp_path, rows), monkeypatch)
    assert shown.count("50") == 4  # in two panels; matplotlib keeps a text for either side of the axes


def test_the_estimator_with_more_points_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = history({"probe/kl_forward_k1_nats": 4.4})
    rows[0]["probe/kl_forward_rb_nats"] = 0.0
    assert "forward\n4.40" in text_of(write(tmp_path, rows), monkeypatch)


def test_values_that_are_not_finite_are_gaps_not_errors(tmp_path: Path) -> None:
    rows = history(PAIRS)
    rows[2]["probe/margin_nats"] = math.nan
    rows[3]["probe/kl_forward_rb_nats"] = math.inf
    assert draw_report(write(tmp_path, rows)).exists()


def test_the_table_gives_start_end_and_interval_of_what_was_measured() -> None:
    rows = {row[0]: row[1:] for row in result_rows(result())}
    assert rows["held-out accuracy"] == ("0.500", "0.730", "[0.690, 0.770]")
    assert rows["KL forward, nats per answer"] == ("–", "4.20", "[3.71, 4.69]")  # 4.2 ± 1.96 · 0.25
    assert rows["KL reverse, nats per answer"] == ("–", "5.00", "")
    assert not any("k1" in label or "AUC" in label for label in rows)


def test_a_value_that_was_not_finite_has_no_row_or_a_dash() -> None:
    given = result(start={"probe/margin_nats": None}, final={"probe/accuracy": None, "probe/margin_nats": 1.0})
    assert result_rows(given) == [("preference margin, nats", "–", "1.00", "")]


def test_k1_stands_in_the_table_where_there_is_nothing_better() -> None:
    rows = result_rows(result(final={"probe/kl_forward_k1_nats": 2.0}))
    assert rows == [("KL forward (k1), nats per answer", "–", "2.00", "")]


def test_the_table_fits_eighty_columns_and_tells_how_far_accuracy_went() -> None:
    console = Console(width=80, file=io.StringIO())
    console.print(result_table(result(ceiling=0.96)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text and "dpo · beta 0.1 · 300 steps" in text
    assert "50% of the way" in text  # (.73 − .5) / (.96 − .5)


def test_the_ceiling_line_is_left_out_where_it_says_nothing() -> None:
    assert ceiling_line({"probe/accuracy": 0.7}, None) is None
    assert ceiling_line({"probe/accuracy": 0.7}, 0.5) is None
    assert ceiling_line({}, 0.9) is None


def test_zero_has_no_sign_and_missing_intervals_are_empty() -> None:
    assert range_text(bounds({"a": 1.0, "a_low": -0.001, "a_high": math.nan}, "a"), ".2f") == ""
    assert range_text(bounds({"a": 1.0, "a_low": -0.001, "a_high": -2.0}, "a"), ".2f") == "[0.00, −2.00]"


# --- nothing that overstates ---------------------------------------------------------------------------------------

ROUNDED = {
    "probe/margin_nats": 0.05, "probe/margin_nats_low": -0.1, "probe/margin_nats_high": 0.2,
    "probe/accuracy": 0.57, "probe/accuracy_low": 0.37, "probe/accuracy_high": 0.75,
    "probe/logratio_chosen_nats": 0.04, "probe/logratio_rejected_nats": -0.01,
    "probe/reward_chosen": 0.004, "probe/reward_rejected": -0.001,
    "probe/kl_forward_rb_nats": 0.05, "probe/kl_forward_rb_nats_se": 0.002,
    "probe/floor_nats": 0.6, "probe/kl_floor_nats": 0.06,
}  # fmt: skip


def pairs_of(folder: Path, count: int) -> Path:
    """probe.jsonl with so many pairs at the last of two scorings."""
    sides = {"logratio_chosen_nats": 0.1, "logratio_rejected_nats": -0.1}
    write_jsonl(folder / "probe.jsonl", [{"step": step, **sides} for step in (0, 400) for _ in range(count)])
    return folder


@pytest.mark.parametrize(("points", "style"), [(2, "None"), (3, ":"), (9, "-")])
def test_two_points_are_not_joined_and_a_few_by_dots_alone(
    points: int, style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = figure_of(write(tmp_path, history(PAIRS | GOLD, points)), monkeypatch)
    styles = {line.get_linestyle() for axes in figure.axes for line in drawn(axes)}
    assert len(figure.axes) == 6 and styles == {style}


@pytest.mark.parametrize(("points", "kind"), [(3, LineCollection), (9, PolyCollection)])
def test_every_panel_whose_quantity_has_an_interval_shows_it(
    points: int, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = {f"probe/reward_{side}{end}": value for side in ("chosen", "rejected") for end, value in
             (("_low", -0.6), ("_high", 0.1))}  # fmt: skip
    whole = PAIRS | sides | GOLD | {"gold/capability_low": 0.88, "gold/capability_high": 0.95}
    figure = figure_of(write(tmp_path, history(whole, points)), monkeypatch)
    assert all(any(isinstance(item, kind) for item in axes.collections) for axes in figure.axes)
    low = min(y for path in panel_of(figure, "Accuracy").collections[0].get_paths() for _, y in path.vertices)
    assert low == 0  # at step 0, where accuracy and interval are 0 here
    highest = max(y for path in panel_of(figure, "Accuracy").collections[0].get_paths() for _, y in path.vertices)
    assert highest == pytest.approx(0.77)


@pytest.mark.parametrize(("count", "said", "face"), [(256, "256 pairs", "#0072B2"), (9, "only 9 pairs", "white")])
def test_a_rate_says_how_many_pairs_it_rests_on_and_few_are_hollow(
    count: int, said: str, face: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = figure_of(pairs_of(write(tmp_path, history(PAIRS)), count), monkeypatch)
    accuracy = panel_of(figure, "Accuracy")
    assert accuracy.texts[0].get_text() == f"{said} · dashed: chance"
    assert {line.get_markerfacecolor() for line in drawn(accuracy)} == {face}


def test_what_lies_below_the_floor_is_drawn_as_a_floor_and_called_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = figure_of(write(tmp_path, history(ROUNDED)), monkeypatch)
    bands = {axes.get_title(loc="left").split()[0]: hatched(axes) for axes in figure.axes}
    assert bands["Preference"] == [(-0.6, 0.6)] and bands["KL"] == [(0.0, 0.06)] and bands["Accuracy"] == []
    assert bands["Implicit"] == [(pytest.approx(-0.06), pytest.approx(0.06))]  # beta .1
    ends = [text.get_text() for axes in figure.axes for text in axes.texts if text.get_fontweight() == "bold"]
    assert ends == ["rounding", "chosen\nrounding", "rejected\nrounding", "rounding", "forward\nrounding"]
    assert all(axes.get_ylim()[1] > band[1] for axes in figure.axes for band in hatched(axes))


def test_what_lies_above_the_floor_keeps_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    above = ROUNDED | {"probe/logratio_rejected_nats": -0.7, "probe/reward_rejected": -0.07}
    shown = text_of(write(tmp_path, history(above | {"probe/kl_forward_rb_nats": 0.07})), monkeypatch)
    assert {"0.05", "0.57", "rejected\n−0.07", "forward\n0.07", "chosen\nrounding"} <= set(shown)
    assert "hatched: rounding" in shown


def test_no_text_stands_within_a_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of(write(tmp_path, history(PAIRS | GOLD)), monkeypatch, ceiling=0.87)
    for axes in figure.axes:
        for text in (text for text in axes.texts if text.get_text()):
            box, panel = text.get_window_extent(), axes.bbox
            assert box.x0 >= panel.x1 or box.y0 >= panel.y1, text.get_text()


def test_the_tables_say_what_is_rounding() -> None:
    rows = {row[0]: row[2:] for row in result_rows({"final": ROUNDED})}
    assert rows["held-out accuracy"] == ("0.570 (rounding)", "[0.370, 0.750]")
    assert rows["KL forward, nats per answer"] == ("0.05 (rounding)", "[0.05, 0.05]")
    assert rows["rounding of an answer, nats"] == ("0.600", "") and rows["KL of rounding, nats per answer"][0] == "0.06"
    sure = ROUNDED | {"probe/margin_nats_low": 0.01}
    assert ["rounding)" in row[2] for row in result_rows({"final": sure})][:2] == [False, False]
    in_fp32 = {key: value for key, value in ROUNDED.items() if "floor" not in key}
    assert not any("rounding" in text for row in result_rows({"final": in_fp32}) for text in row)
    assert ceiling_line(ROUNDED, 0.96) is None and ceiling_line(in_fp32, 0.96) is not None
    console = Console(width=80, file=io.StringIO())
    console.print(result_table(result(final=ROUNDED)))
    assert all(len(line) <= 80 for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    assert "KL forward, nats per answer" in console.file.getvalue()  # type: ignore[attr-defined]
