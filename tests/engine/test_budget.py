"""The prefill share against simulated machines whose steps cost overhead + tokens * cost."""

import pytest

from service.engine.budget import PrefillBudget

TARGET = 0.1


def settle(budget: PrefillBudget, overhead: float, cost: float, num_steps: int = 40, num_decoding: int = 4) -> int:
    """Runs mixed steps that take as much as the budget gives; returns the last share."""
    for _ in range(num_steps):
        share = budget.share(num_decoding)
        budget.observe(num_decoding, share, overhead + share * cost)
    return budget.share(num_decoding)


def test_everything_is_given_while_nobody_decodes() -> None:
    budget = PrefillBudget(512, 16, TARGET)
    budget.observe(0, 512, 10.0)
    assert budget.share(0) == 512


def test_the_least_is_given_while_costs_are_unknown() -> None:
    assert PrefillBudget(512, 16, TARGET).share(1) == 16


@pytest.mark.parametrize(("overhead", "cost"), [(0.02, 0.001), (0.05, 0.0002), (0.001, 0.004)])
def test_the_step_settles_at_the_target(overhead: float, cost: float) -> None:
    budget = PrefillBudget(512, 16, TARGET)
    for _ in range(5):
        budget.observe(4, 0, overhead)
    share = settle(budget, overhead, cost)
    assert overhead + share * cost == pytest.approx(TARGET, rel=0.1)


def test_a_stale_overhead_does_no_lasting_harm() -> None:
    budget = PrefillBudget(512, 16, TARGET)
    for _ in range(9):
        budget.observe(1, 0, 0.005)  # one row; then 60 rows that never have a step to themselves
    share = settle(budget, overhead=0.05, cost=0.0005, num_decoding=60)
    assert 0.05 + share * 0.0005 == pytest.approx(TARGET, rel=0.1)


def test_it_recovers_when_the_machine_does() -> None:
    budget = PrefillBudget(512, 16, TARGET)
    assert settle(budget, overhead=0.09, cost=0.01) == 16
    assert settle(budget, overhead=0.01, cost=0.0001) > 400


def test_a_slow_step_makes_one_share_small() -> None:
    budget = PrefillBudget(512, 16, TARGET)
    budget.observe(4, 0, 0.02)
    before = settle(budget, overhead=0.02, cost=0.001)
    budget.observe(4, before, 5.0)
    assert budget.share(4) == 16
    assert settle(budget, overhead=0.02, cost=0.001, num_steps=1) == pytest.approx(before, rel=0.1)


def test_a_quick_step_makes_none_large() -> None:
    budget = PrefillBudget(512, 16, TARGET)
    before = settle(budget, overhead=0.02, cost=0.001)
    budget.observe(4, before, 0.03)
    assert budget.share(4) == pytest.approx(before, rel=0.1)


def test_the_target_holds_while_a_token_costs_more_with_every_step() -> None:
    """As deep in a long prompt, where each attends to all before it."""
    budget = PrefillBudget(512, 16, TARGET)
    cost = 0.0003
    settle(budget, overhead=0.01, cost=cost)
    for _ in range(12):
        cost *= 1.1
        share = budget.share(4)
        budget.observe(4, share, 0.01 + share * cost)
        assert 0.01 + share * cost < 1.15 * TARGET


def test_prompts_progress_however_slow_decoding_is() -> None:
    budget = PrefillBudget(512, 16, TARGET)
    for _ in range(20):
        budget.observe(64, 0, 3.0)
    assert settle(budget, overhead=3.0, cost=0.1) == 16


def test_shares_and_rows_fit_the_batch() -> None:
    budget = PrefillBudget(64, 16, TARGET)
    budget.observe(0, 64, 0.0001)
    assert [budget.share(num) for num in (1, 60, 64)] == [63, 4, 0]


def test_a_fixed_chunk_caps_every_share() -> None:
    budget = PrefillBudget(512, 16, TARGET, max_prefill_chunk=8)
    assert (budget.share(0), budget.share(5)) == (8, 8)


@pytest.mark.parametrize("arguments", [(0, 1, 0.1), (8, 0, 0.1), (8, 1, 0.0), (8, 1, float("nan")), (8, 1, 0.1, 0)])
def test_a_budget_needs_sense(arguments: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match=r"must be|at least one"):
        PrefillBudget(*arguments)
