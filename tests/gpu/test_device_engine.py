"""The engine's loop one step ahead of a device that is as late as can be: the tokens of a CPU, a step at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model.gpu.graphs import Buckets
from model.gpu.runner import load_device_runner
from model.interface import Backend, Dtype, Runner, RunnerOptions, Sampling
from model.runner import load_runner
from service.config import Settings
from service.engine.engine import Engine
from service.engine.messages import FinishCode, Limits, Submit
from service.engine.process import engine_options
from tests.engine.ledger import FAR, Ledger, run_to_end
from tests.gpu.late_device import LIBRARY, LateDevice
from tests.model.checkpoints import write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NUM_NEW = 8
SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.3, seed=5, presence_penalty=0.5, num_logprobs=1),
    Sampling(temperature=1.1, seed=9),
)


def run(runner: Runner) -> Ledger:
    """Three sequences of ten tokens, of which two begin alike; the last may not end before its third new one."""
    engine, ledger = Engine(runner, engine_options(Settings(), runner.shape)), Ledger()
    for index, sampling in enumerate(SAMPLINGS):
        prompt = [3 + position * (1 + index // 2) for position in range(10)]
        limits = Limits(NUM_NEW, 3 if index == 2 else 0, tuple(range(40)) if index == 2 else (), FAR, float(index))
        engine.submit(Submit(index, prompt, len(prompt), sampling, limits, b"root"))
    run_to_end(engine, ledger)
    return ledger


def test_tokens_are_those_of_the_cpu_though_memory_is_short(tmp_path: Path) -> None:
    directory = write_checkpoint(
        tmp_path, vocab_size=97, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48
    )
    roomy = RunnerOptions(
        str(directory),
        Dtype.FLOAT32,
        backend=Backend.TORCH,
        block_size=16,
        num_blocks=12,
        max_num_seqs=3,
        max_batch_tokens=12,
        context_length=64,
        num_threads=1,
    )
    tight = replace(roomy, backend=Backend.GPU, num_blocks=3)
    theirs = load_runner(roomy)[0]
    mine, facts = load_device_runner(tight, device=LateDevice(), buckets=Buckets((1, 2, 4), (4, 12)), products=LIBRARY)
    assert (facts.backend, facts.card, mine.shape.runs_ahead) == ("gpu", LateDevice.name, True)
    assert mine.shape.max_generated_tokens == 3 + 12, "all rows, and a whole step of what is computed again"
    assert engine_options(Settings(), mine.shape).depth == 1 and engine_options(Settings(), theirs.shape).depth == 0

    expected, found = run(theirs), run(mine)
    assert found.num_preempted > 0 == expected.num_preempted
    assert found.tokens == expected.tokens
    assert found.finishes == expected.finishes
    assert found.finishes[2] is FinishCode.STOP_TOKEN and len(found.tokens[2]) > 3, "a step ahead was dropped"
    assert found.num_dropped > 0
    for one, other in zip(found.logprobs[1], expected.logprobs[1], strict=True):
        assert one is not None and other is not None
        assert one.chosen == pytest.approx(other.chosen, abs=2e-5)
