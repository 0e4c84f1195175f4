"""The engine on a real card: the same tokens whichever way a sequence is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from model.interface import Runner, Sampling
from service.engine.engine import Engine, EngineOptions
from tests.engine.ledger import Ledger, make_submit, run_to_end
from tests.gpu.test_on_a_card import NUM_NEW, NUM_SEQUENCES, loaded, model_in, needs_card, prompts

pytestmark = needs_card


def run(
    runner: Runner,
    given: Sequence[list[int]],
    options: EngineOptions,
    sampling: Sampling | None = None,
    ledger: Ledger | None = None,
) -> dict[int, list[int]]:
    """Gives an engine all prompts at once; what each goes on with."""
    engine, ledger = Engine(runner, options), ledger or Ledger()
    for index, prompt in enumerate(given):
        submit = make_submit(index, prompt, NUM_NEW, arrival=float(index))
        one = Sampling(temperature=0.0) if sampling is None else replace(sampling, seed=index)
        engine.submit(msgspec.structs.replace(submit, sampling=one))
    run_to_end(engine, ledger)
    return ledger.tokens


AHEAD = EngineOptions(depth=1, prefix_cache=False)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, top_k=200, repetition_penalty=1.1, presence_penalty=0.2)


@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["greedy", "sampled"])
def test_graphs_and_depth_change_no_token(tmp_path_factory: pytest.TempPathFactory, sampling: Sampling | None) -> None:
    model_dir = model_in(tmp_path_factory)
    given = prompts()[:40]
    expected = run(loaded(model_dir), given, AHEAD, sampling)
    assert len({token for tokens in expected.values() for token in tokens}) > 100
    assert run(loaded(model_dir), given, replace(AHEAD, depth=0), sampling) == expected
    assert run(loaded(model_dir, captures_graphs=False), given, AHEAD, sampling) == expected


def test_alone_and_among_256_the_tokens_are_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    model_dir = model_in(tmp_path_factory)
    given, runner = prompts(), loaded(model_dir)
    together = run(runner, given, AHEAD)
    for index in range(0, NUM_SEQUENCES, 32):
        assert run(runner, [given[index]], AHEAD)[0] == together[index], index


def test_preemptions_change_no_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What was generated before is computed again, several tokens a step, as decoding computed it."""
    model_dir, ledger = model_in(tmp_path_factory), Ledger()
    given = [prompt[:60] for prompt in prompts()[2:]]
    expected = run(loaded(model_dir), given, AHEAD)
    assert run(loaded(model_dir, num_blocks=250, block_size=16), given, AHEAD, ledger=ledger) == expected
    assert ledger.num_preempted > 5


def test_chunks_and_a_cached_prefix_change_no_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    model_dir = model_in(tmp_path_factory)
    given, runner = prompts()[:32], loaded(model_dir)
    whole = run(runner, given, AHEAD)
    assert run(runner, given, replace(AHEAD, max_prefill_chunk=100)) == whole
    engine, ledgers = Engine(runner, replace(AHEAD, prefix_cache=True)), (Ledger(), Ledger())
    for ledger in ledgers:
        for index, prompt in enumerate(given):
            submit = make_submit(index, prompt, NUM_NEW, arrival=float(index), cache_root=b"root")
            engine.submit(msgspec.structs.replace(submit, sampling=Sampling(temperature=0.0)))
        run_to_end(engine, ledger)
        assert ledger.tokens == whole
    assert ledgers[1].starts[2].num_cached == 0 < ledgers[1].starts[4].num_cached
