"""The comparison's table: medians, ratios within rounds, the quietest of several tries, shares of the limit."""

from __future__ import annotations

import pytest

from loadtest.cpu_table import Cell, Measurement, as_markdown, best_of, quietest, rows_of

BATCH = Cell("M", "W2", 8, "bf16")
SINGLE = Cell("M", "W1", 1, "int8")


def batch(engine: str, number: int, rate: float, others: float = 0.0) -> Measurement:
    return Measurement(BATCH, engine, number, others, {"output_tokens_per_second": rate})


def single(engine: str, number: int, ms: float, prefill: float) -> Measurement:
    figures = {"ms_per_token": ms, "prefill_tokens_per_second": prefill, "output_tokens_per_second": 1.0}
    return Measurement(SINGLE, engine, number, 0.0, figures)


def test_ratios_are_within_rounds_and_to_the_best_peer() -> None:
    ours = [batch("quire", number, rate) for number, rate in enumerate((200.0, 300.0, 90.0))]
    slow = [batch("llamacpp", number, 50.0) for number in range(3)]
    fast = [batch("openvino", number, rate) for number, rate in enumerate((100.0, 100.0, 90.0))]
    [row] = rows_of([*ours, *slow, *fast], {})
    assert row.best_peer == "openvino"
    assert row.ratio == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert row.engines["quire"] == {"median": 200.0, "min": 90.0, "max": 300.0}
    assert row.share_of_limit is None


def test_where_less_is_better_the_ratio_still_grows_with_our_lead() -> None:
    rows = rows_of(
        [single("quire", 1, 5.0, 900.0), single("llamacpp", 1, 10.0, 300.0)], {(SINGLE, 1): {"ms_per_token": 4.0}}
    )
    assert [row.figure for row in rows] == ["ms_per_token", "prefill_tokens_per_second"]
    assert [row.ratio["median"] if row.ratio else None for row in rows] == [2.0, 3.0]
    assert rows[0].share_of_limit == 0.8
    assert rows[1].share_of_limit is None


def test_grpc_is_set_beside_the_engine_and_is_no_peer() -> None:
    [row] = rows_of([batch("quire", 1, 100.0), batch("quire-grpc", 1, 95.0)], {})
    assert row.grpc_over_engine == {"median": 0.95, "min": 0.95, "max": 0.95}
    assert row.best_peer is None
    assert row.ratio is None


def test_a_share_of_the_limit_is_of_the_rounds_own() -> None:
    limits = {(BATCH, number): {"output_tokens_per_second": 100.0 * number} for number in (1, 2, 3)}
    [row] = rows_of([batch("quire", number, 50.0 * number) for number in (1, 2, 3, 4)], limits)
    assert (row.limit, row.share_of_limit) == (200.0, 0.5)


def test_rounds_that_one_side_lacks_do_not_count() -> None:
    [row] = rows_of([batch("quire", 1, 100.0), batch("quire", 2, 500.0), batch("openvino", 1, 50.0)], {})
    assert row.ratio == {"median": 2.0, "min": 2.0, "max": 2.0}


def test_of_several_tries_the_quietest_counts() -> None:
    tries = [batch("quire", 1, 10.0, 0.5), batch("quire", 1, 90.0, 0.05), batch("quire", 1, 50.0, 0.2)]
    assert quietest(tries) == [tries[1]]
    [row] = rows_of(tries, {})
    assert row.num_noisy == {"quire": 0}


def test_noise_that_stayed_is_marked() -> None:
    [row] = rows_of([batch("quire", 1, 10.0, 0.5), batch("openvino", 1, 10.0)], {})
    assert row.num_noisy == {"quire": 1, "openvino": 0}
    line = as_markdown([row]).splitlines()[-1]
    assert "| ~10 (10 to 10) | 10 (10 to 10) |" in line


def test_the_table_has_a_column_for_each_engine_and_a_dash_for_what_is_missing() -> None:
    rows = rows_of(
        [batch("quire", 1, 1234.5), batch("openvino", 1, 617.0), single("quire", 1, 5.0, 900.0)],
        {(BATCH, 1): {"output_tokens_per_second": 2469.0}},
    )
    lines = as_markdown(rows).splitlines()
    dash = "\N{EN DASH}"
    assert lines[0] == "| work | quire | openvino | ours / best peer | gRPC / engine | share of the limit |"
    assert lines[2] == (
        "| M W2 at 8 bf16: output tok/s | 1,234 (1,234 to 1,234) | 617 (617 to 617) "
        f"| 2.00 (2.00 to 2.00) | {dash} | 50% |"
    )
    assert lines[3].startswith(f"| M W1 int8: ms per token | 5.00 (5.00 to 5.00) | {dash} |")
    assert {line.count("|") for line in lines} == {7}


def test_a_measurement_comes_back_as_it_was_written() -> None:
    found = batch("quire", 2, 3.0, 0.04)
    assert Measurement.from_record(found.as_record()) == found


@pytest.mark.parametrize(("lower_is_better", "best"), [(True, "a"), (False, "b")])
def test_the_best_is_by_median(lower_is_better: bool, best: str) -> None:
    spreads = {name: {"median": median} for name, median in (("a", 1.0), ("b", 2.0))}
    assert best_of(spreads, lower_is_better) == best
    assert best_of({}, lower_is_better) is None
