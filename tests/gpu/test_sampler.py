"""The card's draw against model.sampling's, which is its specification: the same tokens for the same logits."""

import pytest
import torch
import triton
import triton.language as tl

from model import philox as cpu_philox
from model.gpu import filters, penalties, sampler
from model.gpu.philox import exponential
from model.interface import Admission, Sampling
from model.sampling import Sampler, SlotState, change, in_groups, most_likely
from model.transformer import Logits

# numpy, in which the interpreter computes, warns of what IEEE 754 defines and the sampler counts on.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
NAN, INF = float("nan"), float("inf")
SEEDS = (0, 1, 2**32 + 7, 2**64 - 1)
PARAMETERS = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1e-45},
    {"temperature": 1e-3, "top_p": 0.9},
    {"temperature": 90.0},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 30.0, "top_k": 20},
    {"temperature": 1.0, "top_k": 80},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 2.5, "top_p": 0.999},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    {"temperature": 20.0, "top_k": 60, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.5, "min_p": 1.0},
    {"temperature": 1.2, "top_k": 30, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.2, "top_p": 0.7, "min_p": 0.1},
)


def random_logits(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


class Card:
    """Slots of these parameters, and what a draw leaves behind."""

    def __init__(self, samplings, vocab_size, max_num_rows=64):
        self.parameters = sampler.DrawParameters.empty(len(samplings), vocab_size, "cpu")
        for slot, sampling in enumerate(samplings):
            self.parameters.admit(slot, sampling)
        self.workspace = sampler.Workspace.empty(max_num_rows, vocab_size, "cpu")

    def draw(self, logits_RV, slots, positions):
        """Token ids and whether rows are finite; -1 and True where nothing was written."""
        token_ids_R = int32([-1] * len(slots))
        is_finite_R = torch.ones(len(slots), dtype=torch.bool)
        untouched_RV = logits_RV.clone()
        sampler.draw(
            logits_RV, int32(slots), int32(positions), self.parameters, self.workspace, token_ids_R, is_finite_R
        )
        assert torch.equal(logits_RV.view(torch.int32), untouched_RV.view(torch.int32))
        return token_ids_R.tolist(), is_finite_R.tolist()


def draw_on_cpu(samplings, logits_RV, slots, positions):
    reference = Sampler(len(samplings), logits_RV.shape[1], torch.zeros(len(samplings), max(positions) + 1))
    for slot, sampling in enumerate(samplings):
        reference.admit(slot, Admission((), 0, sampling))
    sampled = reference.sample(Logits.of(logits_RV), slots, positions)
    return sampled.token_ids, sampled.is_finite


def samplings_of(*parameters):
    return [Sampling(seed=SEEDS[i % len(SEEDS)], **given) for i, given in enumerate(parameters)]


def make_rows(kind, num_rows, vocab_size):
    """Logits such as models give, and such as they should not."""
    logits_RV = random_logits(num_rows, vocab_size, seed=vocab_size)
    if kind == "bfloat16":  # many ties
        logits_RV = logits_RV.bfloat16().float()
    elif kind == "few values":
        logits_RV = logits_RV.clamp(-1, 1).round()
    elif kind == "forbidden":  # structured output leaves few tokens
        logits_RV[random_logits(num_rows, vocab_size, seed=1, scale=1) < 1.5] = -INF
    elif kind == "equal":
        logits_RV = torch.full((num_rows, vocab_size), -7.5)
    elif kind == "one":
        token_ids = torch.arange(num_rows) * 31 % vocab_size
        logits_RV = torch.full((num_rows, vocab_size), -INF).scatter_(1, token_ids[:, None], 2.0)
    return logits_RV


@triton.jit
def noise_kernel(key_ptr, out_ptr, position, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + index, exponential(tl.load(key_ptr), tl.load(key_ptr + 1), position, index))


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_that_of_the_cpu(seed):
    key_2 = torch.tensor(cpu_philox.split_seed(seed))
    noise_N = torch.empty(256, dtype=torch.float64)
    noise_kernel[(1,)](key_2, noise_N, 2**31 - 1, SIZE=256)
    expected_1N = cpu_philox.exponential(key_2[None], torch.tensor([2**31 - 1]), 256)
    assert torch.allclose(noise_N, expected_1N[0], rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("vocab_size", "kind"),
    [
        pytest.param(97, "bfloat16", marks=pytest.mark.slow),
        pytest.param(97, "few values", marks=pytest.mark.slow),
        (97, "forbidden"),
        (97, "equal"),
        (97, "one"),
        (1000, "normal"),
        pytest.param(1000, "forbidden", marks=pytest.mark.slow),
        pytest.param(1000, "equal", marks=pytest.mark.slow),
        (4096, "normal"),
        pytest.param(8300, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_the_cpu(vocab_size, kind):
    samplings = samplings_of(*PARAMETERS)
    slots = [*range(len(samplings))] * (2 if vocab_size < 1000 else 1)
    positions = [(i * 7919) % 5000 for i in range(len(slots))]
    logits_RV = make_rows(kind, len(slots), vocab_size)
    assert Card(samplings, vocab_size).draw(logits_RV, slots, positions) == draw_on_cpu(
        samplings, logits_RV, slots, positions
    )


@pytest.mark.parametrize("kind", ["normal", "bfloat16", "few values", "equal"])
def test_filters_keep_what_the_cpu_keeps(kind):
    vocab_size = 1000
    samplings = samplings_of(
        {"top_k": 1},
        {"top_k": 15},
        {"top_k": 17},  # more than there are groups
        {"top_k": 999},
        {"top_p": 0.01, "temperature": 0.7},
        {"top_p": 0.5, "temperature": 0.7},
        {"top_p": 0.97, "temperature": 2.0},
        {"top_k": 300, "top_p": 0.8},
    )
    card = Card(samplings, vocab_size)
    slots = range(len(samplings))
    logits_RV = make_rows(kind, len(slots), vocab_size)
    card.draw(logits_RV, slots, [0] * len(slots))
    parameters, workspace = card.parameters, card.workspace
    scaled_RV = (logits_RV - logits_RV.amax(dim=1, keepdim=True)) / parameters.temperature_S[:, None]
    depth_RV = scaled_RV.view(torch.int32) & filters.MAGNITUDE.value
    cut_R1, last_R1 = (table[: len(slots), None] for table in (workspace.cut_depths_R, workspace.cut_ids_R))
    kept_RV = (depth_RV < cut_R1) | ((depth_RV == cut_R1) & (torch.arange(vocab_size) <= last_R1))
    expected_RV = most_likely(scaled_RV, scaled_RV.exp(), parameters.top_k_S.long(), parameters.top_p_S)
    assert torch.equal(kept_RV, expected_RV)
    weights_RG = in_groups(scaled_RV.exp() * expected_RV).sum(dim=-1)
    assert torch.allclose(workspace.group_weights_RG[: len(slots)], weights_RG, rtol=1e-6, atol=0)


def test_broken_rows_are_told_and_spoil_no_other():
    vocab_size = 4133  # the last token is in a part of its own
    samplings = samplings_of({"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 3}, {"top_p": 0.5})
    slots = [slot for slot in range(4) for _ in range(5)]
    positions = [9] * len(slots)
    logits_RV = make_rows("normal", len(slots), vocab_size)
    healthy = draw_on_cpu(samplings, logits_RV, slots, positions)[0]
    logits_RV[0::5, -1] = NAN
    logits_RV[1::5, 0] = INF
    logits_RV[2::5] = -INF
    logits_RV[3::5] = NAN
    token_ids, is_finite = Card(samplings, vocab_size).draw(logits_RV, slots, positions)
    assert is_finite == [False, False, False, False, True] * 4
    assert is_finite == [row.isfinite().all().item() for row in logits_RV]
    assert token_ids == [healthy[i] if is_finite[i] else 0 for i in range(len(slots))]


def test_a_row_is_the_same_alone_elsewhere_and_among_others():
    vocab_size = 4133
    samplings = samplings_of(*PARAMETERS[::2])
    num_rows = len(samplings)
    logits_RV = make_rows("bfloat16", num_rows, vocab_size)
    slots, positions = [*range(num_rows)], [*range(100, 100 + num_rows)]
    card = Card(samplings, vocab_size)
    expected = card.draw(logits_RV, slots, positions)[0]
    weights_RG = card.workspace.group_weights_RG[:num_rows].clone()
    order = [*range(num_rows)][::-1]
    wide_RV = torch.full((num_rows + 2, vocab_size + 3), NAN)  # rows apart, and padding rows around them
    wide_RV[1:-1, :vocab_size] = logits_RV[order]
    padded_slots, padded_positions = [-1, *order, -1], [0, *(positions[i] for i in order), 0]
    token_ids, is_finite = card.draw(wide_RV[:, :vocab_size], padded_slots, padded_positions)
    assert token_ids == [-1, *(expected[i] for i in order), -1]
    assert all(is_finite)
    drawn = [i for i, sampling in enumerate(samplings) if sampling.temperature > 0]
    moved_RG = card.workspace.group_weights_RG[1 : num_rows + 1][order]
    assert torch.equal(weights_RG[drawn], moved_RG[drawn])
    for i in (0, 3, 6, 8):
        assert card.draw(logits_RV[i : i + 1], [i], [positions[i]])[0] == [expected[i]]


def test_the_position_and_the_seed_make_the_draw():
    samplings = [Sampling(seed=3), Sampling(seed=3), Sampling(seed=4)]
    logits_RV = torch.zeros(4, 1000)
    slots, positions = [0, 1, 2, 0], [5, 5, 5, 6]
    token_ids, _ = Card(samplings, 1000).draw(logits_RV, slots, positions)
    assert token_ids[0] == token_ids[1]
    assert len(set(token_ids)) == 3


def make_changes(admissions, vocab_size):
    changes = penalties.Changes.empty(len(admissions), vocab_size, max_num_biases=5, max_num_ends=3, device="cpu")
    for slot, admission in enumerate(admissions):
        changes.admit(slot, admission)
    return changes


ADMISSIONS = [
    Admission((3, 1, 4, 1, 5, 9, 2, 6, 5, 9, 9), 5, sampling, min_new_tokens, ends)
    for sampling, min_new_tokens, ends in (
        (Sampling(), 0, (7,)),
        (Sampling(repetition_penalty=1.3), 0, ()),
        (Sampling(repetition_penalty=1e-40, presence_penalty=0.3), 0, ()),
        (Sampling(presence_penalty=0.7, frequency_penalty=-0.31), 0, ()),
        (Sampling(repetition_penalty=0.7, presence_penalty=-2.0, frequency_penalty=1.7), 7, (9, 0, 11)),
        (Sampling(logit_bias=((9, 2.5), (0, -100.0), (96, 0.1), (12, 3.0), (13, 1e-3))), 7, (9, 96)),
        (Sampling(logit_bias=((9, 2.5),), frequency_penalty=0.1, repetition_penalty=3.0), 6, (9,)),
    )
]


@pytest.mark.parametrize("vocab_size", [97, 4133])
def test_penalties_are_bitwise_those_of_the_cpu(vocab_size):
    changes = make_changes(ADMISSIONS, vocab_size)
    slots = [6, 0, 3, 1, 4, 2, 5]
    slots_R, drawn_R = int32([*slots, -1]), int32([9, 9, 0, 12, 3, 96, 9, 5])
    for step in range(2):
        logits_RV = random_logits(len(slots) + 1, vocab_size, seed=step)
        logits_RV[:, 5] = torch.finfo(torch.float32).max  # what a repetition penalty below 1 would make infinite
        logits_RV[:, 4] = -INF
        known = [[*ADMISSIONS[slot].token_ids, *[int(drawn_R[i])] * step] for i, slot in enumerate(slots)]
        expected_RV = logits_RV.clone()
        for i, slot in enumerate(slots):
            state = SlotState.of(ADMISSIONS[slot])
            if state.changes_logits(len(known[i])):
                change(expected_RV[i], state, torch.tensor(known[i]))
        penalties.apply_penalties(logits_RV, slots_R, int32([*map(len, known), 0]), changes)
        assert torch.equal(logits_RV.view(torch.int32), expected_RV.view(torch.int32))
        penalties.count_tokens(slots_R, drawn_R, changes)
    changes.admit(6, ADMISSIONS[0])
    assert changes.counts_SV[6].tolist() == make_changes(ADMISSIONS[:1], vocab_size).counts_SV[0].tolist()
    assert changes.bias_ids_SB[6].tolist() == [penalties.NOTHING] * 5


def test_a_broken_row_stays_broken_whatever_is_forbidden():
    admission = Admission((1,), 1, Sampling(repetition_penalty=0.5, logit_bias=((1, 3.0),)), 5, (0, 1))
    for token_id, value in ((0, NAN), (1, INF), (1, NAN), (2, NAN)):
        logits_1V = torch.zeros(1, 97)
        logits_1V[0, token_id] = value
        penalties.apply_penalties(logits_1V, int32([0]), int32([1]), make_changes([admission], 97))
        penalties.apply_bitmask(logits_1V, torch.zeros(1, 4, dtype=torch.int32), torch.tensor([True]))
        assert Card([Sampling()], 97).draw(logits_1V, [0], [1])[1] == [False]


@pytest.mark.parametrize("vocab_size", [64, 97, 4133])
def test_a_bitmask_forbids_tokens_where_asked(vocab_size):
    num_words = -(-vocab_size // 32)
    is_allowed_RV = random_logits(3, vocab_size) > 0
    bits_RWB = torch.zeros(3, num_words * 32, dtype=torch.int64)
    bits_RWB[:, :vocab_size] = is_allowed_RV
    words_RW = (bits_RWB.view(3, num_words, 32) << torch.arange(32)).sum(dim=-1)
    bitmask_RW = torch.where(words_RW >= 2**31, words_RW - 2**32, words_RW).int()
    logits_RV = random_logits(3, vocab_size, seed=1)
    expected_RV = logits_RV.masked_fill(~is_allowed_RV & torch.tensor([[True], [False], [True]]), -INF)
    penalties.apply_bitmask(logits_RV, bitmask_RW, torch.tensor([True, False, True]))
    assert torch.equal(logits_RV, expected_RV)


@pytest.mark.parametrize("module", [sampler, penalties])
def test_variants_name_every_argument(module):
    variants = module.variants()
    assert len({variant.name for variant in variants}) == len(variants)
    for variant in variants:
        assert {*variant.kernel.arg_names} == {*variant.signature, *variant.constants}
        assert not variant.signature.keys() & variant.constants.keys()
        assert {*variant.aligned} <= variant.signature.keys()
