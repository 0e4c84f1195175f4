"""FlashAttention-3 in the place of our attention: its plan, whole steps of a runner by it, and who is refused.

Without a card a stand-in computes, which takes what the real one takes. On a card it is the real one, if it is there.
"""

import sys
from types import ModuleType

import pytest
import torch

from model.gpu import flash_attention
from model.gpu.attention import PagedAttention
from model.gpu.flash_attention import MODULE, FlashAttention, find_fault
from model.gpu.runner import load_device_runner
from model.interface import Admission, Backend, Dtype, GpuAttention, Row
from model.runner import load_runner
from tests.gpu import fake_flash_attn
from tests.gpu.late_device import LIBRARY, LateDevice
from tests.gpu.test_attention import make_case, variant_of
from tests.gpu.test_device_runner import (
    BUCKETS,
    CONTEXT_LENGTH,
    PROMPTS,
    TOLD,
    VOCAB_SIZE,
    admit,
    assert_same,
    decode,
    on_the_cpu,
    options,
    play,
    script,
)
from tests.gpu.test_on_a_card import needs_card, skip_without_flash_attention
from tests.model.checkpoints import write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
HOPPER = (9, 0)
PADDING_TOKENS = 5
SPANS = [(70, 1), (37, 37), (90, 21), (16, 2), (1, 1), (100, 1)]
SINGLES = [(70, 1), (3, 1), (16, 1)]
ASKED = {"gpu_attention": GpuAttention.FLASH_ATTENTION_3}


@pytest.fixture
def _is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, fake_flash_attn.module())


@pytest.fixture
def _takes_float32(monkeypatch):
    """So that whole steps can be held to the tokens of a CPU, wherever that one rounds."""
    monkeypatch.setattr(flash_attention, "DTYPE", torch.float32)
    monkeypatch.setattr(fake_flash_attn, "DTYPES", {torch.float32})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("model"), vocab_size=VOCAB_SIZE, hidden_size=32, num_heads=2, num_kv_heads=1,
        head_dim=16, intermediate_size=48, context_length=CONTEXT_LENGTH,
    )  # fmt: skip


def case_of(heads, spans):
    """What no row may read is not a number; but before a window begins, whole tiles are multiplied by zero."""
    case = make_case(spans, heads, torch.bfloat16)
    if heads.window:
        case.k_cache, case.v_cache = case.k_cache.nan_to_num(), case.v_cache.nan_to_num()
    return case


def tensors_of(case, device, tables_R):
    """What a step of a case is given, with tokens of padding, its tables at these places: arguments, plan, output."""
    tables = torch.full((max(tables_R) + 1, case.tables.shape[1]), 2**30, dtype=torch.int32)
    tables[list(tables_R)] = case.tables
    q = torch.cat([case.q, torch.zeros_like(case.q[:PADDING_TOKENS])])
    given = [tensor.to(device) for tensor in (q, case.k_cache, case.v_cache, tables)]
    return [*given, torch.empty_like(q, device=device)]


def plan_of(case, attention, device, tables_R):
    names = torch.tensor(tables_R).numpy()
    return torch.from_numpy(attention.plan(*case.lengths, names)).to(device)


def assert_near(case, found):
    """Equal to the reference but for rounding to bfloat16: of each weight, and of the result."""
    case.k_cache, case.v_cache = case.k_cache.nan_to_num(), case.v_cache.nan_to_num()
    torch.testing.assert_close(found[: len(case.q)].float().cpu(), case.reference(), atol=0.02, rtol=0.02)


def assert_right(heads, spans, device):
    """Tables in rows of their own, then in slots."""
    attention = FlashAttention(heads, len(spans) + 3, device)
    for places in (range(len(spans)), [9, 0, 7, 3, 4, 1][: len(spans)]):
        case = case_of(heads, spans)
        tensors, plan = tensors_of(case, device, places), plan_of(case, attention, device, places)
        attention.attend(*tensors, is_decode_only=spans is SINGLES, plan=plan)
        assert_near(case, tensors[-1])


@pytest.mark.usefixtures("_is_installed")
@pytest.mark.parametrize(
    "heads",
    [variant_of(), variant_of(num_heads=6, num_kv_heads=2, head_dim=24), variant_of(window=20, soft_cap=2.0)],
    ids=["plain", "groups of three", "window and soft cap"],
)
@pytest.mark.parametrize("spans", [SPANS, SINGLES], ids=["mixed", "decode"])
def test_results_are_those_of_the_reference(heads, spans):
    assert_right(heads, spans, CPU)


@pytest.mark.usefixtures("_is_installed")
def test_a_plan_is_as_long_whatever_its_rows():
    attention, case = FlashAttention(variant_of(), 3, CPU), make_case([(5, 2), (9, 1), (4, 4)])
    plan = attention.plan(*case.lengths)
    assert plan.tolist() == [0, 2, 3, 7, 5, 9, 4, 0, 0, 1, 2, 0] and len(plan) == attention.num_plan_words
    assert plan_of(case.part(0, 0, 2), attention, CPU, [6]).tolist() == [0, 2, 2, 2, 5, 0, 0, 0, 6, 0, 0, 0]
    nothing = torch.zeros(1, dtype=torch.int32).numpy()
    assert not attention.plan(nothing, nothing[:0], nothing[:0]).any()
    four = make_case([(1, 1)] * 4)
    with pytest.raises(ValueError, match="4 rows: at most 3 are planned for"):
        attention.plan(*four.lengths)


def loaded(directory, captures_graphs=True, **changes):
    """A runner whose attention is FlashAttention-3, and its device."""
    device = LateDevice()
    given = options(directory, backend=Backend.GPU, captures_graphs=captures_graphs, **ASKED, **changes)
    return load_device_runner(given, device=device, buckets=BUCKETS, products=LIBRARY)[0], device


@pytest.mark.usefixtures("_is_installed", "_takes_float32")
@pytest.mark.parametrize(
    "captures_graphs", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["graphs", "eager"]
)
def test_steps_are_those_of_the_cpu(model_dir, captures_graphs):
    """Four sequences, one in chunks, mixed with single tokens; buckets, padding, fewer rows than slots."""
    mine, device = loaded(model_dir, captures_graphs)
    num_replayed = device.num_replayed
    assert_same(play(mine, script(), depth=1), play(on_the_cpu(model_dir), script()))
    assert device.num_replayed - num_replayed == (8 + 4 if captures_graphs else 0)


@pytest.mark.usefixtures("_is_installed", "_takes_float32")
def test_a_prefix_that_is_there_and_chunks_change_nothing(model_dir):
    """In blocks of a size that our own attention does not take."""
    prompt = [position % VOCAB_SIZE for position in range(100)]
    whole = [[admit(0, prompt, 32, TOLD)], [Row(0, 32, 32)], [Row(0, 64, 32)], [Row(0, 96, 4, wants_token=True)]]
    expected = play(on_the_cpu(model_dir), [*whole, *decode(0, 100, 2)])[-3:]
    mine, _ = loaded(model_dir, block_size=48)
    admission = Admission(prompt, 100, TOLD)
    steps = [[Row(0, 0, 32, range(3), admission=admission)], [Row(0, 32, 31)], [Row(0, 63, 32)], [Row(0, 95, 5)]]
    steps += [[Row(2, 96, 4, (0, 1, 7), True, admission)], *decode(2, 100, 2)]
    assert_same(play(mine, steps, depth=1)[-3:], expected)


@pytest.mark.usefixtures("_is_installed")
def test_who_asks_for_it_is_told(model_dir, caplog):
    given = options(model_dir, dtype=Dtype.BFLOAT16, captures_graphs=False, **ASKED)
    mine, facts = load_device_runner(given, device=LateDevice(), buckets=BUCKETS, products=LIBRARY)
    assert facts.attention == "flash-attention-3"
    assert "FlashAttention-3 computes attention: the last bits of answers may depend on the load" in caplog.text
    theirs, _ = load_runner(options(model_dir, dtype=Dtype.BFLOAT16, backend=Backend.TORCH))
    steps = [[admit(0, PROMPTS[2], 13, TOLD)]]
    (found,), (expected,) = (play(runner, steps)[0].logprobs for runner in (mine, theirs))
    assert found.top_logprobs == pytest.approx(expected.top_logprobs, abs=0.1)


def without_part(**arguments):
    raise RuntimeError("This flash attention build does not support paged KV.\nException raised from mha_fwd at ...")


def of_another_time(q, k_cache, v_cache, cache_seqlens=None):
    raise AssertionError("not called")


@pytest.mark.parametrize(
    ("changes", "call", "said"),
    [
        ({"dtype": Dtype.FLOAT32}, without_part, "FlashAttention-3 computes bfloat16, not float32"),
        ({}, None, "flash_attn_interface cannot be used: module .* has no attribute"),
        ({}, lambda *cache, **rest: without_part(), "does not do what it is asked for: This .* paged KV.$"),
        ({}, of_another_time, "does not do what it is asked for: .* unexpected keyword argument"),
    ],
    ids=["dtype", "another package", "built without a part", "another version"],
)
def test_what_it_cannot_do_is_refused(model_dir, monkeypatch, changes, call, said):
    module = ModuleType(MODULE)
    if call is not None:
        module.flash_attn_with_kvcache = call
    monkeypatch.setitem(sys.modules, MODULE, module)
    given = options(model_dir, **{"dtype": Dtype.BFLOAT16, **ASKED, **changes})
    with pytest.raises(ValueError, match=f"^gpu_attention: .*{said}") as error:
        load_device_runner(given, device=LateDevice(), buckets=BUCKETS, products=LIBRARY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("head_dim", "capability", "said"),
    [
        (128, HOPPER, "flash_attn_interface cannot be used: import of flash_attn_interface halted"),
        (128, (8, 9), "FlashAttention-3 is for cards of compute capability 9.x, this one has 8.9"),
        (128, (10, 0), "FlashAttention-3 is for cards of compute capability 9.x, this one has 10.0"),
        (264, HOPPER, "FlashAttention-3 takes heads of multiples of 8 up to 256, not 264"),
        (20, HOPPER, "FlashAttention-3 takes heads of multiples of 8 up to 256, not 20"),
    ],
)
def test_where_it_does_not_compute_is_known_before_weights_are_read(monkeypatch, head_dim, capability, said):
    monkeypatch.setitem(sys.modules, MODULE, None)
    assert find_fault(head_dim, torch.bfloat16, capability).startswith(said)


@pytest.fixture
def _is_there():
    skip_without_flash_attention()


def on_a_card(test):
    for mark in [*needs_card, pytest.mark.usefixtures("_is_there")]:
        test = mark(test)
    return test


LONG_SPANS = [(3000, 1), (700, 130), *SPANS[:4]]
HEADS = [
    variant_of(num_heads=8, num_kv_heads=2, head_dim=128, block_size=64),
    variant_of(num_heads=8, head_dim=64, block_size=64, window=100),
    variant_of(num_heads=6, num_kv_heads=6, head_dim=96, block_size=48),
]
NAMES = ["groups", "window", "each its own"]


@on_a_card
@pytest.mark.parametrize("heads", HEADS, ids=NAMES)
@pytest.mark.parametrize("spans", [LONG_SPANS, SINGLES], ids=["mixed", "decode"])
def test_on_a_card_results_are_those_of_the_reference(heads, spans):
    assert_right(heads, spans, torch.device("cuda"))


@on_a_card
@pytest.mark.parametrize("heads", HEADS[:2], ids=NAMES[:2])
@pytest.mark.parametrize("spans", [LONG_SPANS, SINGLES], ids=["mixed", "decode"])
def test_a_captured_step_serves_other_rows_and_is_near_our_own(heads, spans):
    """Captured over a plan of mere padding, as a runner does."""
    device, case = torch.device("cuda"), case_of(heads, spans)
    tensors, is_decode_only = tensors_of(case, device, range(len(spans))), spans is SINGLES
    flash = FlashAttention(heads, len(spans) + 2, device)
    plan = torch.zeros(flash.num_plan_words, dtype=torch.int32, device=device)
    flash.attend(*tensors, is_decode_only=is_decode_only, plan=plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flash.attend(*tensors, is_decode_only=is_decode_only, plan=plan)
    plan.copy_(plan_of(case, flash, device, range(len(spans))))
    graph.replay()
    limits = {"max_rows": len(spans), "max_tokens": len(case.q), "max_context": 3000, "num_programs": 64}
    ours, out = PagedAttention(heads, **limits, device=device), torch.empty_like(tensors[-1])
    our_plan = plan_of(case, ours, device, range(len(spans)))
    ours.attend(*tensors[:-1], out, is_decode_only=is_decode_only, plan=our_plan)
    torch.testing.assert_close(tensors[-1][: len(case.q)], out[: len(case.q)], atol=0.02, rtol=0.02)
