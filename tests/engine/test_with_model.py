"""The loop with the real runner and the default model: the same tokens, whatever the pool, the chunks and the depth."""

from dataclasses import replace

import pytest

from model.interface import Quantization, RunnerOptions, Sampling
from model.native.library import Kernels
from model.runner import load_runner
from service.config import BUILT_IN_MODEL
from service.engine.engine import Engine, EngineOptions
from tests.engine.ledger import Ledger, make_submit, run_to_end

NUM_SEQUENCES = 8
LARGE = RunnerOptions(str(BUILT_IN_MODEL), num_blocks=256, max_num_seqs=8, max_batch_tokens=64, num_threads=2)
SMALL = replace(LARGE, num_blocks=8)


def generate(runner_options: RunnerOptions, engine_options: EngineOptions) -> Ledger:
    engine, ledger = Engine(load_runner(runner_options)[0], engine_options), Ledger()
    for index in range(NUM_SEQUENCES):
        prompt = [100 + (17 * position + position // 20 * index) % 900 for position in range(30 + 3 * index)]
        submit = make_submit(index, prompt, 24, arrival=float(index), cache_root=b"root")
        sampling = Sampling(temperature=0.9 if index % 2 else 0.0, top_p=0.95, seed=index)
        engine.submit(type(submit)(index, prompt, len(prompt), sampling, submit.limits, b"root"))
    run_to_end(engine, ledger)
    return ledger


@pytest.fixture(scope="module", params=list(Quantization))
def quantization(request: pytest.FixtureRequest, native_kernels: Kernels) -> Quantization:
    """Only the compiled kernels promise equal tokens."""
    return request.param


@pytest.fixture(scope="module")
def large(quantization: Quantization) -> RunnerOptions:
    return replace(LARGE, quantization=quantization)


@pytest.fixture(scope="module")
def undisturbed(large: RunnerOptions) -> dict[int, list[int]]:
    ledger = generate(large, EngineOptions(prefix_cache=False))
    assert ledger.num_preempted == 0
    return ledger.tokens


def test_preemption_and_prefix_hits_change_no_token(
    quantization: Quantization, undisturbed: dict[int, list[int]]
) -> None:
    ledger = generate(replace(SMALL, quantization=quantization), EngineOptions())
    assert ledger.num_preempted > 0
    assert ledger.tokens == undisturbed


def test_small_chunks_change_no_token(large: RunnerOptions, undisturbed: dict[int, list[int]]) -> None:
    assert generate(large, EngineOptions(max_prefill_chunk=7)).tokens == undisturbed


def test_running_one_step_ahead_changes_no_token(large: RunnerOptions, undisturbed: dict[int, list[int]]) -> None:
    assert generate(large, EngineOptions(depth=1)).tokens == undisturbed
