"""The runner on a real card, near the logits of a CPU; and what the tests of it with the engine share."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import triton

from model.gpu.device_runner import DeviceRunner
from model.gpu.flash_attention import find_fault
from model.gpu.runner import load_device_runner
from model.interface import (
    Admission,
    Backend,
    Batch,
    Dtype,
    GpuAttention,
    Row,
    Runner,
    RunnerOptions,
    Sampled,
    Sampling,
)
from model.runner import load_runner
from service.config import BUILT_IN_MODEL
from tests.model.checkpoints import write_checkpoint

needs_card = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs compiled kernels: TRITON_INTERPRET=0"),
]

pytestmark = needs_card

VOCAB_SIZE = 4000
NUM_SEQUENCES = 256
NUM_NEW = 24
NUM_TOLD = 20


@cache
def model_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As deep as a random model may be before its logits say little: with heads and widths of usual sizes."""
    return write_checkpoint(
        tmp_path_factory.mktemp("model"), vocab_size=VOCAB_SIZE, hidden_size=1024, num_heads=16, num_kv_heads=4,
        head_dim=64, intermediate_size=2816, num_layers=4, dtype="bfloat16",
    )  # fmt: skip


@cache
def loaded(
    model_dir: Path,
    captures_graphs: bool = True,
    gpu_attention: GpuAttention = GpuAttention.TRITON,
    num_blocks: int = 4000,
    block_size: int | None = None,
) -> DeviceRunner:
    """One runner serves many engines, one after the other."""
    given = RunnerOptions(
        str(model_dir),
        Dtype.BFLOAT16,
        backend=Backend.GPU,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=NUM_SEQUENCES,
        max_batch_tokens=2048,
        captures_graphs=captures_graphs,
        gpu_attention=gpu_attention,
    )
    return load_device_runner(given)[0]


def prompts() -> list[list[int]]:
    """Of one to some three hundred tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 63, 64, 65, *torch.randint(1, 320, (NUM_SEQUENCES - 5,), generator=generator).tolist()]
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def tell(runner: Runner, prompt: list[int]) -> Sampled:
    """What a runner draws after a prompt, with log-probabilities."""
    sampling = Sampling(temperature=0.0, num_logprobs=NUM_TOLD)
    blocks = range(-(-len(prompt) // runner.shape.block_size))
    row = Row(0, 0, len(prompt), blocks, wants_token=True, admission=Admission(prompt, len(prompt), sampling))
    return runner.launch(Batch([row], len(prompt))).result()


def skip_without_flash_attention() -> None:
    """Says why it does not compute here."""
    fault = find_fault(128, torch.bfloat16, torch.cuda.get_device_capability())
    if fault is not None:
        pytest.skip(fault)


@pytest.mark.parametrize("gpu_attention", GpuAttention)
@pytest.mark.parametrize("is_built_in", [False, True], ids=["random", "built-in"])
def test_logits_are_near_those_of_a_cpu_in_float32(
    tmp_path_factory: pytest.TempPathFactory, gpu_attention: GpuAttention, is_built_in: bool
) -> None:
    if gpu_attention is GpuAttention.FLASH_ATTENTION_3:
        skip_without_flash_attention()
    model_dir = BUILT_IN_MODEL if is_built_in else model_in(tmp_path_factory)
    given = RunnerOptions(str(model_dir), Dtype.FLOAT32, backend=Backend.TORCH, num_blocks=200, max_batch_tokens=2048)
    theirs, mine = load_runner(given)[0], loaded(model_dir, gpu_attention=gpu_attention)
    for prompt in prompts()[:12]:
        (one,), (other,) = tell(mine, prompt).logprobs, tell(theirs, prompt).logprobs
        assert one is not None and other is not None
        expected = dict(zip(other.top_ids, other.top_logprobs, strict=True))
        shared = [(value, expected[i]) for i, value in zip(one.top_ids, one.top_logprobs, strict=True) if i in expected]
        assert len(shared) > NUM_TOLD // 2
        assert all(abs(value - reference) < 0.15 for value, reference in shared), shared
