"""The plots can be read: labelled ticks, marked percentiles, axes that begin where they say."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.plots import as_data_url, milliseconds, plot_distribution, plot_load, plot_throughput, ticks_around


def drawn(figure: Figure) -> list[Axes]:
    figure.draw_without_rendering()
    return figure.axes


def tick_labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def test_ticks_enclose_the_values_at_1_2_and_5() -> None:
    assert ticks_around([3.0, 40.0]) == [2, 5, 10, 20, 50]
    assert ticks_around([1.0, 100.0]) == [0.5, 1, 2, 5, 10, 20, 50, 100, 200]
    assert ticks_around([7.0]) == [5, 10]
    assert ticks_around([]) == [0.5, 1, 2, 5, 10, 20]


def test_a_distribution_runs_over_a_logarithmic_axis_and_marks_percentiles() -> None:
    (axes,) = drawn(plot_distribution([0.003, 0.004, 0.040], "gap"))
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "gap, ms")
    assert tick_labels(axes) == ["2", "5", "10", "20", "50"]
    assert [text.get_text() for text in axes.texts] == ["p50  4.00 ms", "p90  32.8 ms", "p99  39.3 ms"]
    line = axes.lines[0]
    assert np.asarray(line.get_xdata()).tolist() == pytest.approx([2, 3, 4, 40, 50])
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx([0, 100 / 3, 200 / 3, 100, 100])


def test_gaps_of_zero_lift_the_beginning_of_the_curve() -> None:
    (axes,) = drawn(plot_distribution([0.0, 0.0, 0.0, 0.004], "gap"))
    assert axes.texts[0].get_text() == "p50  0 ms"
    line = axes.lines[0]
    assert np.asarray(line.get_xdata()).tolist()[:4] == [2] * 4
    assert np.asarray(line.get_ydata()).tolist()[3] == 75


def test_a_wide_distribution_labels_the_decades_alone() -> None:
    (axes,) = drawn(plot_distribution([1e-5, 100.0], "gap"))
    assert tick_labels(axes) == ["0.01", "0.1", "1", "10", "100", "1,000", "10,000", "100,000"]


def test_a_timeline_counts_in_integers_and_begins_at_zero() -> None:
    requests, usage = drawn(plot_load([1.0, 2.0], [1.0, 2.0], [0.0, 1.0], [0.03, 0.06]))
    assert all(float(tick).is_integer() for tick in requests.get_yticks())
    assert requests.get_xlim()[0] == usage.get_xlim()[0] == requests.get_ylim()[0] == usage.get_ylim()[0] == 0
    assert usage.get_ylim()[1] == pytest.approx(6.6)


def test_throughput_is_per_second_and_keeps_every_token() -> None:
    (axes,) = drawn(plot_throughput([(0.1, 2), (0.9, 1), (2.0, 4)]))
    values, edges, _ = axes.patches[0].get_data()  # type: ignore[attr-defined]
    assert list(values) == [3, 0, 4]
    assert list(edges) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "figure",
    [plot_distribution([], "gap"), plot_distribution([0.0], "gap"), plot_load([], [], [], []), plot_throughput([])],
)
def test_nothing_can_be_drawn_too(figure: Figure) -> None:
    assert as_data_url(figure).startswith("data:image/svg+xml;base64,")


def test_the_same_figure_is_the_same_text() -> None:
    first, second = (as_data_url(plot_distribution([0.003, 0.004], "gap")) for _ in range(2))
    assert first == second


def test_latencies_keep_about_three_figures() -> None:
    assert [milliseconds(value) for value in (0, 0.123, 1.5, 45.67, 1234.5)] == ["0", "0.12", "1.50", "45.7", "1,234"]
