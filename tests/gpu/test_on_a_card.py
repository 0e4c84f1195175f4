"""The runner on a real card: near a CPU's logits, and the same tokens whichever way a sequence is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import pytest
import torch
import triton

from model.gpu.device_runner import DeviceRunner
from model.gpu.runner import load_device_runner
from model.interface import Admission, Backend, Batch, Dtype, Row, Runner, RunnerOptions, Sampled, Sampling
from model.runner import load_runner
from service.engine.engine import Engine, EngineOptions
from tests.engine.ledger import Ledger, make_submit, run_to_end
from tests.model.checkpoints import write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs compiled kernels: TRITON_INTERPRET=0"),
]

VOCAB_SIZE = 4000
NUM_SEQUENCES = 256
NUM_NEW = 24
NUM_TOLD = 20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As deep as a random model may be before its logits say little: with heads and widths of usual sizes."""
    return write_checkpoint(
        tmp_path_factory.mktemp("model"), vocab_size=VOCAB_SIZE, hidden_size=1024, num_heads=16, num_kv_heads=4,
        head_dim=64, intermediate_size=2816, num_layers=4, dtype="bfloat16",
    )  # fmt: skip


@cache
def loaded(model_dir: Path, captures_graphs: bool = True) -> DeviceRunner:
    """One runner serves many engines, one after the other."""
    given = RunnerOptions(
        str(model_dir),
        Dtype.BFLOAT16,
        backend=Backend.GPU,
        num_blocks=4000,
        max_num_seqs=NUM_SEQUENCES,
        max_batch_tokens=2048,
        captures_graphs=captures_graphs,
    )
    return load_device_runner(given)[0]


def prompts() -> list[list[int]]:
    """Of one to some three hundred tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 63, 64, 65, *torch.randint(1, 320, (NUM_SEQUENCES - 5,), generator=generator).tolist()]
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def run(
    runner: Runner, given: Sequence[list[int]], options: EngineOptions, sampling: Sampling | None = None
) -> dict[int, list[int]]:
    """Gives an engine all prompts at once; what each goes on with."""
    engine, ledger = Engine(runner, options), Ledger()
    for index, prompt in enumerate(given):
        submit = make_submit(index, prompt, NUM_NEW, arrival=float(index))
        one = Sampling(temperature=0.0) if sampling is None else replace(sampling, seed=index)
        engine.submit(msgspec.structs.replace(submit, sampling=one))
    run_to_end(engine, ledger)
    return ledger.tokens


AHEAD = EngineOptions(depth=1, prefix_cache=False)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, top_k=200, repetition_penalty=1.1, presence_penalty=0.2)


@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["greedy", "sampled"])
def test_graphs_and_depth_change_no_token(model_dir: Path, sampling: Sampling | None) -> None:
    given = prompts()[:40]
    expected = run(loaded(model_dir), given, AHEAD, sampling)
    assert len({token for tokens in expected.values() for token in tokens}) > 100
    assert run(loaded(model_dir), given, replace(AHEAD, depth=0), sampling) == expected
    assert run(loaded(model_dir, captures_graphs=False), given, AHEAD, sampling) == expected


def test_alone_and_among_256_the_tokens_are_the_same(model_dir: Path) -> None:
    given, runner = prompts(), loaded(model_dir)
    together = run(runner, given, AHEAD)
    for index in range(0, NUM_SEQUENCES, 32):
        assert run(runner, [given[index]], AHEAD)[0] == together[index], index


def test_chunks_and_a_cached_prefix_change_no_token(model_dir: Path) -> None:
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


def tell(runner: Runner, prompt: list[int]) -> Sampled:
    """What a runner draws after a prompt, with log-probabilities."""
    sampling = Sampling(temperature=0.0, num_logprobs=NUM_TOLD)
    blocks = range(-(-len(prompt) // runner.shape.block_size))
    row = Row(0, 0, len(prompt), blocks, wants_token=True, admission=Admission(prompt, len(prompt), sampling))
    return runner.launch(Batch([row], len(prompt))).result()


def test_logits_are_near_those_of_a_cpu_in_float32(model_dir: Path) -> None:
    given = RunnerOptions(str(model_dir), Dtype.FLOAT32, backend=Backend.TORCH, num_blocks=200, max_batch_tokens=2048)
    theirs, mine = load_runner(given)[0], loaded(model_dir)
    for prompt in prompts()[:12]:
        (one,), (other,) = tell(mine, prompt).logprobs, tell(theirs, prompt).logprobs
        assert one is not None and other is not None
        expected = dict(zip(other.top_ids, other.top_logprobs, strict=True))
        shared = [(value, expected[i]) for i, value in zip(one.top_ids, one.top_logprobs, strict=True) if i in expected]
        assert len(shared) > NUM_TOLD // 2
        assert all(abs(value - reference) < 0.15 for value, reference in shared), shared
