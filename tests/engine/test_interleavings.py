"""Every order of steps, arrivals, cancels and deadlines, for two sequences that do not both fit the pool."""

from dataclasses import replace
from itertools import product

import pytest

from model.interface import Sampling
from service.engine.engine import Engine, EngineOptions
from service.engine.messages import FinishCode
from tests.engine.conftest import FakeClock
from tests.engine.fake_runner import SHAPE, FakeRunner, expected_tokens
from tests.engine.ledger import FAR, Ledger, make_submit, run_to_end, step

TINY = replace(SHAPE, num_blocks=3, block_size=2, num_slots=2, max_batch_tokens=4)
PROMPTS = {1: [1, 2, 3], 2: [1, 2, 4]}
MAX_NEW = 3
ACTIONS = ("submit 1", "submit 2", "step", "cancel 1", "cancel 2", "deadline 1")
LENGTH = 5


def act(action: str, engine: Engine, ledger: Ledger, clock: FakeClock, submitted: set[int]) -> None:
    verb, _, number = action.partition(" ")
    sequence_id = int(number or 0)
    if verb == "step":
        step(engine, ledger)
    elif verb == "cancel":
        engine.cancel([sequence_id])
    elif verb == "deadline":
        clock.now += 1
    elif sequence_id not in submitted:
        submitted.add(sequence_id)
        deadline = clock.now + 1 if sequence_id == 1 else FAR
        arrival = clock.now + len(submitted)
        engine.submit(
            make_submit(
                sequence_id, PROMPTS[sequence_id], MAX_NEW, deadline=deadline, arrival=arrival, cache_root=b"root"
            )
        )


@pytest.mark.parametrize("depth", [0, 1])
def test_every_interleaving_ends_each_sequence_once(depth: int) -> None:
    ends: set[tuple[int, FinishCode]] = set()
    for actions in product(ACTIONS, repeat=LENGTH):
        clock, ledger, submitted = FakeClock(), Ledger(), set[int]()
        engine = Engine(FakeRunner(TINY), EngineOptions(depth=depth), clock)
        for action in actions:
            act(action, engine, ledger, clock, submitted)
        run_to_end(engine, ledger, max_steps=40)
        assert ledger.finishes.keys() == submitted, actions
        for sequence_id in submitted:
            expected = expected_tokens(PROMPTS[sequence_id], MAX_NEW, Sampling())
            drawn = ledger.tokens.get(sequence_id, [])
            assert drawn == expected[: len(drawn)], actions
            assert (drawn == expected) or ledger.finishes[sequence_id] is not FinishCode.LENGTH, actions
        ends |= set(ledger.finishes.items())
    everything = (FinishCode.LENGTH, FinishCode.CANCELLED)
    assert ends == {(1, FinishCode.DEADLINE), *((number, code) for number in (1, 2) for code in everything)}
