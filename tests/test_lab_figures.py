"""Figures are drawn from the arrays they are given: what they compute on the way is right."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from flashmla import schedule
from flashmla.lab import (
    figures,
    figures_dsa,
    figures_fp8,
    figures_paged_kv,
    figures_roofline,
    figures_split_kv,
)
from flashmla.reference import split_kv

LENGTHS = ([4096], [6000, 300, 0, 2500, 40, 900], [0, 0, 0], [640] * 12, [65, 0, 10_000, 64])


def drawn(figure) -> bool:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return len(picture.getvalue()) > 2000


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("parts", [1, 3, 8, 132])
@pytest.mark.parametrize("invariant", [False, True], ids=["plan", "batch-invariant"])
def test_segments_are_the_work_that_the_oracle_finds_in_the_plan(lengths, parts, invariant):
    metadata, _ = schedule.plan(lengths, parts, invariant)
    found = [
        (piece.part, piece.request, piece.first_tile, piece.last_tile)
        for piece in figures_split_kv.segments(metadata, lengths)
    ]
    want = [
        (part, request, first, last)
        for part, row in enumerate(metadata)
        for request, first, last in split_kv.work_of(row, lengths)
    ]
    assert found == want


def test_segments_hold_every_tile_once():
    lengths = torch.tensor(LENGTHS[1], dtype=torch.int32)
    metadata = torch.from_numpy(schedule.plan(LENGTHS[1], 8)[0])
    tiles = sorted(
        (piece.request, tile)
        for piece in figures_split_kv.segments(metadata, lengths)
        for tile in range(piece.first_tile, piece.last_tile)
    )
    want = [(i, t) for i, length in enumerate(LENGTHS[1]) for t in range(-(-length // 64))]
    assert tiles == want


def test_part_times_count_tiles_and_openings():
    naive = [[0, 0, 1, 0, 0, 0, 0, 0], [1, 0, 2, 0, 0, 0, 0, 0], [2, 0, 2, 0, 0, 0, 0, 0]]
    assert figures_split_kv.part_times(naive, [65, 0]).tolist() == [5 + 2, 5, 0]
    chunks, _ = schedule.plan([64 * 40], 1, batch_invariant=True)
    assert figures_split_kv.part_times(chunks, [64 * 40]).tolist() == [3 * 5 + 40]


def test_gantt_shows_parts_without_work_and_goes_as_far_as_it_is_told():
    naive = [[0, 0, 1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0, 0]]
    for until, end in ((50, 51), (10, 15.3)):  # two per cent behind it, and never before the work
        (axes,) = figures_split_kv.gantt(naive, [640], until=until).axes
        assert axes.get_ylim() == (1.5, -0.5) and axes.get_xlim() == (0, pytest.approx(end))


def test_gantt_has_a_bar_for_every_segment_and_its_opening():
    lengths = LENGTHS[1]
    metadata, _ = schedule.plan(lengths, 8)
    figure = figures_split_kv.gantt(metadata, lengths, "plan")
    bars = figure.axes[0].patches
    pieces = figures_split_kv.segments(metadata, lengths)
    assert len(bars) == 2 * len(pieces)
    widths = [bar.get_width() for bar in bars]
    assert sum(widths) == sum(5 + piece.last_tile - piece.first_tile for piece in pieces)
    assert drawn(figure)


def test_split_weights_sum_to_one_and_empty_splits_weigh_nothing():
    lse = torch.tensor([[0.0, 1.0], [0.0, float("inf")], [float("-inf"), 1.0]])
    figure = figures_split_kv.split_weights(lse)
    weights = figure.axes[0].images[0].get_array().T
    np.testing.assert_allclose(weights, [[0.5, 0.5], [0.5, 0.0], [0.0, 0.5]], atol=1e-7)


def test_parts_sweep_is_in_microseconds():
    figure = figures_split_kv.parts_sweep([1, 4], {"cuda": [200.0, 60.0]}, [190.0, 50.0])
    predicted, measured = figure.axes[0].lines
    assert list(predicted.get_ydata()) == [190.0, 50.0]
    assert list(measured.get_ydata()) == [200.0, 60.0]
    assert drawn(figure)


def test_page_owners_stop_at_the_length():
    table = torch.tensor([[3, 7, 2**31 - 1], [3, 4, -1]], dtype=torch.int32)
    owners = figures_paged_kv.page_owners(table, torch.tensor([100, 128]), 64)
    assert owners == {3: [(0, 64), (1, 64)], 7: [(0, 36)], 4: [(1, 64)]}


def test_block_table_shows_the_numbers_of_live_pages_only():
    table = np.array([[3, 7, 99], [3, 4, 99]])
    figure = figures_paged_kv.block_table(table, np.array([100, 128]), 8, names=["a", "b"])
    left, right = figure.axes
    assert sorted(text.get_text() for text in left.texts) == ["3", "3", "4", "7"]
    assert right.get_title(loc="left") == "pool of 8 pages of 64 tokens, 5 free"
    assert drawn(figure)


def test_a_request_keeps_its_colour_and_a_page_of_one_token_is_seen():
    lengths = np.array([65, 64])
    figure = figures_paged_kv.block_table([[0, 1], [2, 0]], lengths, 3, colours=[4, 0])
    pool = figure.axes[1].patches
    filled = [patch for patch in pool if patch.get_linewidth() == 0]
    first, last, other = filled
    assert first.get_facecolor() == last.get_facecolor() == figures.request_colour(4)
    assert other.get_facecolor() == figures.request_colour(0)
    assert last.get_width() == pytest.approx(0.9 * 0.08)


def test_roof_is_the_lower_of_two_limits():
    roof = figures_roofline.Roof("card", flops=800e12, bandwidth=3.2e12)
    assert roof.ridge == 250.0
    np.testing.assert_allclose(roof.attainable(np.array([1.0, 250.0, 1e4])), [3.2e12, 8e14, 8e14])


def test_roofline_marks_measured_and_predicted_points():
    roof = figures_roofline.Roof("card", flops=800e12, bandwidth=3.2e12)
    points = [figures_roofline.Point("a", 2.0, 6e12), figures_roofline.Point("b", 242.0)]
    figure = figures_roofline.roofline([roof], points)
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "b"]
    assert ([2.0], [6e12]) in [
        (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines
    ]
    assert drawn(figure)


def test_kv_bytes_are_written_beside_their_bars():
    figure = figures.kv_bytes_per_token({"MHA": 81920, "MLA": 1152})
    texts = [text.get_text().strip() for text in figure.axes[0].texts]
    assert texts == ["81,920 B", "1,152 B  (71.1x less)"]
    figure = figures.kv_bytes_per_token({"MHA": 81920, "MQA": 640})
    assert figure.axes[0].texts[1].get_text().strip() == "640 B  (128x less)"


def test_predicted_and_measured_wants_one_value_a_case():
    with pytest.raises(ValueError, match="one entry a case each"):
        figures.predicted_and_measured(["a"], [1.0], [1.0, 2.0], "µs", "x")


def test_byte_map_is_to_scale():
    figure = figures_fp8.byte_map()
    widths = [round(box.get_width()) for box in figure.axes[0].patches]
    assert widths == [1024, 128, 128, 128, 128, 128, 16, 128]
    starts = [round(box.get_x()) for box in figure.axes[0].patches]
    assert starts == [0, 1024, 0, 128, 256, 384, 512, 528]
    assert drawn(figure)


def test_values_of_shows_finite_positive_values_only():
    rows = {"a": np.array([-1.0, 0.0, 2.0, np.nan, np.inf]), "b": np.array([4.0])}
    figure = figures_fp8.values_of(rows, "t")
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines] == [[2.0], [4.0]]
    assert drawn(figure)


def test_part_errors_have_a_bar_for_each_choice_and_layer():
    errors = {"NoPE": {"l0": 0.1, "l1": 0.2}, "RoPE": {"l0": 0.3, "l1": 0.4}}
    figure = figures_fp8.part_errors(errors, "t")
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.1, 0.3, 0.2, 0.4]
    assert drawn(figure)


def test_error_panels_share_their_scale():
    panels = {"a": {"e4m3": [0.1, 0.2]}, "b": {"e4m3": [0.001, 3.0]}}
    figure = figures_fp8.error_by_tile([8, 128], panels, ["8", "128"])
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] < 0.001 and left.get_ylim()[1] > 3.0
    assert drawn(figure)


def test_cache_memory_is_in_gigabytes():
    figure = figures_fp8.cache_memory([4096, 65536], {"a": 10**6, "b": 10**5}, 16e9, "t")
    lines = figure.axes[0].lines
    assert list(lines[0].get_ydata()) == [4.096, 65.536]
    assert list(lines[2].get_ydata()) == [16.0, 16.0]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["4k", "16k", "64k"]
    assert drawn(figure)


def test_mass_by_k_has_a_panel_a_layer_and_a_line_a_way():
    lines = {"best": [0.5, 0.9], "window": [0.1, 0.2]}
    figure = figures_dsa.mass_by_k([16, 64], {"layer 0": lines, "layer 1": lines})
    for axes in figure.axes:
        assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 0.9], [0.1, 0.2]]
    assert [label.get_text() for label in figure.legends[0].get_texts()] == ["best", "window"]
    assert drawn(figure)


def test_selected_text_puts_each_weight_behind_its_letter():
    weights = torch.tensor([0.0, 0.25, 0.0, 1.0, 0.0])
    figure = figures_dsa.selected_text(b"ab\ncd", {"t": weights}, width=3)
    (axes,) = figure.axes
    cells = axes.images[0].get_array()
    assert cells.tolist() == [[0.0, 0.5, 0.0], [1.0, 0.0, 0.0]]
    letters = {text.get_position(): text.get_text() for text in axes.texts}
    assert letters == {(0, 0): "a", (1, 0): "b", (0, 1): "c", (1, 1): "d"}
    assert drawn(figures_dsa.selected_text(b"text " * 80, {"t": np.ones(400)}))


def test_time_by_context_draws_measured_beside_predicted():
    predicted = {"dense": [1.0, 4.0], "sparse": [2.0, 3.0]}
    figure = figures_dsa.time_by_context([512, 2048], {"dense": [5.0, 6.0]}, predicted, "t")
    drawn_lines = [list(line.get_ydata()) for line in figure.axes[0].lines if len(line.get_xdata())]
    assert drawn_lines == [[1.0, 4.0], [5.0, 6.0], [2.0, 3.0]]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["512", "2k"]
    assert drawn(figure)


def test_style_does_not_leak():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figures.predicted_and_measured(["a"], [1.0], [2.0], "µs", "t")
    assert dict(mpl.rcParams) == before
