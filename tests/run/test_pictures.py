"""The pictures of an evaluation, of data and of the reward-hacking watch claim no more than what they rest on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo_kit.callbacks.scores import Scores
from dpo_kit.data.report.picture import draw_data_report
from dpo_kit.evaluate.behaviour import Contest, analyze_failures, watch_hacking
from dpo_kit.evaluate.picture import draw_evaluation
from dpo_kit.evaluate.preferences import describe_preferences
from dpo_kit.run.measures import WIN_RATES
from dpo_kit.run.report.drawing import count_text
from tests.preferences import pairs, report, write_jsonl

GREY, BLUE = "#595959", "#0072B2"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Each figure as it was saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def dots(axes: Axes) -> list[Any]:
    return [line for line in axes.lines if line.get_marker() == "o"]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def preferences(right: int, wrong: int, shorter: int = 0, **more: Any) -> dict[str, Any]:
    """What an evaluation finds where the policy ranks `right` of the pairs as labelled; in `shorter` of all pairs the
    chosen answer is the shorter one.
    """
    count = right + wrong
    margins = torch.tensor([1.0] * right + [-1.0] * wrong, dtype=torch.float64)
    tokens = torch.tensor([8] * shorter + [12] * (count - shorter))
    names = [f"p{number}" for number in range(count)]
    scores = Scores(0, True, margins / 2, -margins / 2, tokens, torch.full((count,), 10), names, names, **more)
    return describe_preferences(scores, [{}] * count, 0.1, "dpo")


def win_rate(prompts: int, decided: int, rate: float = 0.7) -> dict[str, Any]:
    found: dict[str, Any] = {"prompts": prompts, "decided": decided, "win_rate_verdict": "better", "controls": []}
    found["reviewed"] = prompts - 10
    for name in WIN_RATES:
        found |= {name: rate, f"{name}_low": rate - 0.1, f"{name}_high": rate + 0.1}
    outcomes = {"win": decided, "loss": 0, "tie": prompts - decided, "order-dependent": 0, "unjudged": 0}
    judge = {"name": "gold", "kind": "gold"}
    return found | {"comparisons": prompts, "outcomes": outcomes, "judge": judge}


def test_a_count_is_a_word_for_what_there_is() -> None:
    assert count_text([1234], "pairs") == "1,234 pairs" and count_text([9], "pairs") == "only 9 pairs"
    assert count_text([1], "prompts") == "only 1 prompt" and count_text([0], "pairs") == count_text([], "pairs") == ""
    assert count_text([128, 256, 0], "pairs") == "128 to 256 pairs" and count_text([8, 256], "x") == "only 8 to 256 x"


def test_groups_of_fewer_than_ten_pairs_are_shown_as_such(tmp_path: Path, figures: list[Figure]) -> None:
    draw_evaluation(tmp_path / "e.png", {"preferences": preferences(30, 4, shorter=9)}, title="a")
    accuracy = panel(figures[0], "Accuracy")
    assert texts(accuracy)[::2] == ["all (34 pairs)", "chosen longer (25 pairs)", "chosen shorter (only 9 pairs)"]
    looks = [(dot.get_color(), dot.get_markerfacecolor()) for dot in dots(accuracy)]
    assert looks == [(BLUE, BLUE), (BLUE, BLUE), (GREY, "white")]  # all nine are right: certain to nobody
    calibration = panel(figures[0], "Calibration, 34 pairs")
    assert all(dot.get_markerfacecolor() != "white" for dot in dots(calibration))
    draw_evaluation(tmp_path / "e.png", {"preferences": preferences(6, 2)}, title="a")
    assert [dot.get_markerfacecolor() for dot in dots(panel(figures[1], "Calibration, only 8 pairs"))] == ["white"]


def test_every_rate_of_an_evaluation_has_its_interval(tmp_path: Path, figures: list[Figure]) -> None:
    draw_evaluation(tmp_path / "e.png", {"preferences": preferences(30, 4), "win_rate": win_rate(40, 9)}, title="a")
    for title in ("Accuracy", "Win rate", "Calibration"):
        axes = panel(figures[0], title)
        bars = [item for item in axes.collections if item.get_linewidth()[0] > 1.5]  # thinner: the level of chance
        assert len(bars) == len(dots(axes)) > 0, title
    won = panel(figures[0], "Win rate")
    assert texts(won)[::2] == [
        "win rate (40 prompts)", "ties dropped (only 9 comparisons)", "at equal length (40 prompts)",
        "put right by people (30 reviewed prompts)",
    ]  # fmt: skip
    assert [dot.get_color() for dot in dots(won)] == [BLUE, GREY, BLUE, BLUE]


def test_preferences_that_rounding_explains_are_called_so(tmp_path: Path, figures: list[Figure]) -> None:
    even = preferences(11, 11, floor_nats=0.6)
    draw_evaluation(tmp_path / "e.png", {"preferences": even}, title="a")
    assert panel(figures[0], "Accuracy on held-out pairs: rounding")
    draw_evaluation(tmp_path / "e.png", {"preferences": even | {"floor_nats": 0.0}}, title="a")
    assert panel(figures[1], "Accuracy on held-out pairs").get_title(loc="left") == "Accuracy on held-out pairs"


def test_groups_of_losses_have_counts_and_a_ratio_with_its_interval_and_no_line(
    tmp_path: Path, figures: list[Figure]
) -> None:
    long, short = "Pack a tent, a stove and some rope for the night.", "A tent."
    rows = [Contest(f"q{n}", short, long, "loss") for n in range(12)]
    rows += [Contest(f"w{n}", long, long, "win") for n in range(5)]
    failures = {"status": "done", **analyze_failures(rows, tmp_path / "failures")}
    draw_evaluation(tmp_path / "e.png", {"failures": failures}, title="a")
    axes = panel(figures[0], "Where it loses: 12 lost, 5 won")
    group = next(group for group in failures["groups"] if group["name"] == "shorter")
    figure = f"{group['ratio']:.1f} times [{group['low']:.1f}, {group['high']:.1f}]"
    assert f"shorter: 12 and 0, {figure}" in texts(axes)
    assert all(len(line.get_xdata()) == 1 for line in axes.lines)
    assert [dot.get_markerfacecolor() for dot in dots(axes)][:2] == ["#D55E00", "white"]  # five wins are few


def test_a_rule_that_decides_few_pairs_is_hollow_and_intervals_stand_before_and_after(
    tmp_path: Path, figures: list[Figure]
) -> None:
    rows = pairs(40)
    for row in rows[:9]:
        row["chosen"] = f"**{row['chosen']}**"
    found = report(write_jsonl(tmp_path / "a.jsonl", rows))
    draw_data_report(tmp_path / "d.png", found, title="a", before=found)
    axes = panel(figures[0], "Chosen, told by one rule (40 pairs)")
    label = "more markdown (decides only 9 pairs)"
    assert label in texts(axes)
    hollow = [dot for dot in dots(axes) if dot.get_markerfacecolor() == "white"]
    assert len(hollow) == 2 and {dot.get_ydata()[0] for dot in hollow} == {-(texts(axes).index(label) // 2)}
    assert len([item for item in axes.collections if item.get_linewidth()[0] > 1.5]) == len(dots(axes))
    assert panel(figures[0], "Tokens (40 rows)")


@pytest.mark.parametrize(("steps", "style"), [(2, "None"), (3, ":"), (6, "-")])
def test_the_watch_joins_no_two_points_and_says_how_many_prompts(
    steps: int, style: str, tmp_path: Path, figures: list[Figure]
) -> None:
    history = [
        {"step": n, **{f"{key}{end}": n + more for key in ("gold/reward", "probe/margin_nats")
                       for end, more in (("", 0), ("_low", -1), ("_high", 1))}, "probe/floor_nats": 0.3}
        for n in range(steps)
    ]  # fmt: skip
    rows = [Contest(f"q{n}", f"one two three {n}", f"one two {n}", "win") for n in range(8)]
    watch_hacking(rows, history, tmp_path / "h.png")
    margin = panel(figures[0], "Margin")
    for axes in (panel(figures[0], "Gold reward"), margin):
        assert [dot.get_linestyle() for dot in dots(axes)] == [style] and axes.collections
    assert [patch.get_bbox().y1 for patch in margin.patches if patch.get_hatch()] == [0.3]
    styles = panel(figures[0], "Style of the answers (only 8 prompts)")
    assert {dot.get_markerfacecolor() for dot in dots(styles)} == {"white"}
