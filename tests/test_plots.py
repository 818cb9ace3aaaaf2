"""Pictures show the whole data, name what they show, and claim no more than was measured."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

from helpers import made_up
from matplotlib.axes import Axes

from experiments.study.plots import ABOVE, BELOW, UNKNOWN, Panel, color_of_end, plot_accuracy
from lab.plots import Figure, paper_caption, paper_points, plot_curve, save_light_and_dark
from lab.recipe import load_recipe


def drawn(plot, *arguments, **options) -> list[Axes]:
    """The axes of the figure that a function would have saved."""
    with mock.patch.object(Figure, "savefig", autospec=True) as save:
        plot(*arguments, Path("unused.png"), **options)
    return save.call_args[0][0].axes


def test_the_papers_points_say_what_differs():
    _, papers = load_recipe("256")
    papers = replace(papers, model="Qwen/Qwen3-1.7B")
    assert paper_caption(papers) == "the paper's Qwen3-1.7B"
    assert paper_caption(replace(papers, model="other")) == "the paper's Qwen3-1.7B:\nother model"
    assert paper_caption(load_recipe("256-tiny")[1]).endswith(":\nother model, harder problems")


def test_a_curve_has_whole_markers_and_its_caption():
    recipe = load_recipe("256-tiny")[1]
    caption = paper_caption(recipe)
    numbers = {"stage": 0, "kind": "grpo", "eval_accuracy": 0.5, "eval_low": 0.4, "eval_high": 0.6}
    rows = [numbers | {"step": step, "grpo_steps": step} for step in (0, 10, 20)]
    (axes,) = drawn(plot_curve, rows, paper_points(recipe), caption=caption)
    assert axes.get_xlim()[0] < 0
    assert axes.get_xlim()[1] > 20
    assert axes.get_ylim()[0] < 0
    assert caption in [text.get_text() for text in axes.get_legend().get_texts()]
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 10, 20], [0, 10, 20]]


def test_a_picture_is_drawn_for_light_and_for_dark_pages(tmp_path):
    def plot(path: Path) -> None:
        path.write_text(json.dumps(Figure().get_facecolor()))

    save_light_and_dark(plot, tmp_path / "curve.png")
    light = json.loads((tmp_path / "curve.png").read_text())
    dark = json.loads((tmp_path / "curve-dark.png").read_text())
    assert min(light[:3]) > 0.9
    assert max(dark[:3]) < 0.1


def test_sft_alone_is_a_point_and_names_stand_apart():
    ends = {"grpo": {0: 0.0, 100: 50.0}, "staged": {0: 0.0, 100: 50.5}, "sft": {0: 20.0}}
    main = {arm: [made_up(arm, seed, points) for seed in (0, 1)] for arm, points in ends.items()}
    (axes,) = drawn(plot_accuracy, main, (Panel("Which?", tuple(main)),))
    assert axes.get_title(loc="left") == "Which?"
    assert {max(line.get_xdata()) for line in axes.lines} == {0, 100}
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert abs(heights["grpo"] - heights["staged"]) >= 0.069 * axes.get_ylim()[1]
    assert "sft\n(no GRPO)" in heights
    (axes,) = drawn(plot_accuracy, main, (Panel("And per token?", ("grpo",), by_tokens=True),))
    assert [text.get_text() for text in axes.texts] == ["grpo, until its\nshortest run ends"]


def test_an_ablations_color_claims_no_more_than_its_interval():
    grpo = [made_up("grpo", seed, {10: 40.0 + seed}) for seed in range(3)]

    def color(*differences: float) -> str:
        ends = [40.0 + seed + difference for seed, difference in enumerate(differences)]
        return color_of_end([made_up("x", seed, {10: end}) for seed, end in enumerate(ends)], grpo)

    assert color(5, 6, 7) == ABOVE
    assert color(-5, -6, -7) == BELOW
    assert color(-5, 6, 3) == UNKNOWN
    assert color(5, -6, -3) == UNKNOWN
    assert color(5) == UNKNOWN, "one seed has no interval"
