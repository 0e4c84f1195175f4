"""The whole engine against Hugging Face transformers, in float32: under load, in chunks, warm, short of memory.

One undisturbed run of all prompts at once is checked against theirs; every other way must give the very same tokens, in
every precision. (Of the others' logits it is tests/model/test_parity.py that holds them to theirs.)
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import msgspec
import pytest
import torch

from model.interface import Backend, Dtype, Quantization, Runner, RunnerOptions, Sampling
from model.native.library import Kernels
from model.runner import load_runner
from service.config import BUILT_IN_MODEL
from service.engine.engine import Engine, EngineOptions
from tests.engine.ledger import Ledger, make_submit, run_to_end
from tests.model.test_parity import NEAR_TIE, load_theirs, their_logits

NUM_PROMPTS = 64
NUM_NEW = 16
CHUNKS = range(1, 65)
BLOCK_SIZE = 16
RUNNER = RunnerOptions(
    str(BUILT_IN_MODEL),
    Dtype.FLOAT32,
    block_size=BLOCK_SIZE,
    num_blocks=6000,
    max_num_seqs=NUM_PROMPTS,
    num_threads=2,
)

Prompts = Sequence[list[int]]
Tokens = dict[int, list[int]]


@cache
def loaded(options: RunnerOptions) -> Runner:
    """One runner serves many engines, one after the other: an admission leaves nothing of a slot's past."""
    return load_runner(options)[0]


def run(
    prompts: Prompts, runner: RunnerOptions = RUNNER, options: EngineOptions | None = None, num_new: int = NUM_NEW
) -> Ledger:
    """Gives an engine all prompts at once and runs it to the end."""
    engine = Engine(loaded(runner), options or EngineOptions(prefix_cache=False))
    ledger = Ledger()
    submit_all(engine, prompts, num_new)
    run_to_end(engine, ledger, max_steps=sum(map(len, prompts)) + 5000)  # chunks of one take a step for each token
    return ledger


def submit_all(engine: Engine, prompts: Prompts, num_new: int = NUM_NEW) -> None:
    for index, prompt in enumerate(prompts):
        submit = make_submit(index, prompt, num_new, arrival=float(index), cache_root=b"root")
        engine.submit(msgspec.structs.replace(submit, sampling=Sampling(temperature=0.0)))


def random_prompts(num_prompts: int, longest: int) -> list[list[int]]:
    rng = random.Random(5)
    lengths = [1, longest, *(rng.randint(1, longest) for _ in range(num_prompts - 2))]
    return [[rng.randrange(4, 4096) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(NUM_PROMPTS, 900)


@pytest.fixture(scope="module")
def expected(prompts: Prompts, native_kernels: Kernels) -> Tokens:
    """What 64 requests in flight give; `test_64_requests_in_flight` holds it against theirs."""
    ledger = run(prompts)
    assert ledger.num_preempted == 0
    return ledger.tokens


def check_against_theirs(prompts: Prompts, tokens: Tokens) -> None:
    """Each token is their most likely one, but for ties."""
    theirs = load_theirs(BUILT_IN_MODEL, torch.float32)
    for index, prompt in enumerate(prompts):
        output = tokens[index]
        logits_TV = their_logits(theirs, prompt + output[:-1])[len(prompt) - 1 :]
        lead_T = logits_TV.max(-1).values - logits_TV[torch.arange(NUM_NEW), output]
        assert lead_T.max() < NEAR_TIE, (len(prompt), output, logits_TV.argmax(-1).tolist())


def test_64_requests_in_flight(prompts: Prompts, expected: Tokens) -> None:
    check_against_theirs(prompts, expected)


def test_8_requests_in_flight_where_torch_computes() -> None:
    some = random_prompts(8, 100)
    check_against_theirs(some, run(some, replace(RUNNER, backend=Backend.TORCH)).tokens)


def test_alone(prompts: Prompts, expected: Tokens) -> None:
    for index in range(0, NUM_PROMPTS, 7):
        assert run([prompts[index]]).tokens[0] == expected[index]


def test_every_chunk_size(native_kernels: Kernels) -> None:
    some = random_prompts(3, 70)
    whole = run(some).tokens
    for chunk in CHUNKS:
        options = EngineOptions(prefix_cache=False, max_prefill_chunk=chunk)
        assert run(some, options=options).tokens == whole, chunk


@pytest.mark.slow
@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_chunk_size_with_all_prompts(prompts: Prompts, expected: Tokens, chunk: int) -> None:
    assert run(prompts, options=EngineOptions(prefix_cache=False, max_prefill_chunk=chunk)).tokens == expected


def test_warm_prefix_cache(prompts: Prompts, expected: Tokens) -> None:
    engine, cold, warm = Engine(loaded(RUNNER), EngineOptions()), Ledger(), Ledger()
    submit_all(engine, prompts)
    run_to_end(engine, cold)
    submit_all(engine, prompts)
    run_to_end(engine, warm)
    assert cold.tokens == warm.tokens == expected
    for index, prompt in enumerate(prompts):
        assert warm.starts[index].num_cached == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_hundred_preemptions(native_kernels: Kernels, prefix_cache: bool) -> None:
    some = random_prompts(NUM_PROMPTS, 3)
    # Many short prompts that grow long: the sequences outgrow what they were admitted with again and again.
    tight = replace(RUNNER, num_blocks=10)
    ledger = run(some, tight, EngineOptions(prefix_cache=prefix_cache), num_new=100)
    assert ledger.num_preempted >= 100
    assert ledger.tokens == run(some, num_new=100).tokens


@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize("dtype", list(Dtype))
def test_every_precision_gives_the_same_tokens_whatever_the_load(
    native_kernels: Kernels, dtype: Dtype, quantization: Quantization
) -> None:
    some, runner = random_prompts(20, 100), replace(RUNNER, dtype=dtype, quantization=quantization)
    together = run(some, runner, num_new=40).tokens
    for index in range(0, len(some), 5):
        assert run([some[index]], runner, num_new=40).tokens[0] == together[index]
    assert run(some, runner, EngineOptions(prefix_cache=False, max_prefill_chunk=7), 40).tokens == together
    tight = run(some, replace(runner, num_blocks=20), EngineOptions(), 40)
    assert tight.num_preempted > 0
    assert tight.tokens == together
