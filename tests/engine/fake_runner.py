"""A runner without a model, for tests of everything above it.

The token drawn at a position depends on the whole history before it, and that history is read back through the block
table: each position of a block holds a chained hash of the tokens up to it, as keys and values would. So a wrong block,
a stale one, one that was freed too early or shared for writing changes the output, or fails an assertion at once. With
a limit on generated tokens, a block of them serves nobody whose prompt has the same ones.
Steps are computed when their result is asked for, in launch order: the latest moment that a device may take.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from model.interface import NO_LOGPROBS, Admission, Batch, Row, RunnerShape, Sampled, Sampling, TokenLogprobs

SHAPE = RunnerShape(num_blocks=32, block_size=4, num_slots=8, context_length=256, vocab_size=97, max_batch_tokens=32)
NEVER = -1


def chain(previous: int, token_id: int) -> int:
    return hash((previous, token_id))


def draw(history: int, seed: int, vocab_size: int, banned: Sequence[int]) -> int:
    """A token that depends on the history and the seed only."""
    value = hash((history, seed))
    while value % vocab_size in banned:
        value = hash((value,))
    return value % vocab_size


@dataclass
class Slot:
    """What a real runner keeps by slot."""

    token_ids: list[int]
    admission: Admission
    num_computed: int
    table: list[int] = field(default_factory=list)
    histories: list[int] = field(default_factory=list)


@dataclass
class FakePending:
    runner: "FakeRunner"
    batch: Batch
    sampled: Sampled | None = None

    def result(self) -> Sampled:
        while self.sampled is None:
            step = self.runner.in_flight.popleft()
            step.sampled = self.runner.compute(step.batch)
        return self.sampled


class FakeRunner:
    """Computes what `expected_tokens` says. `nan_token` in a history makes its logits non-finite."""

    def __init__(
        self, shape: RunnerShape = SHAPE, nan_token: int = NEVER, on_step: Callable[[Batch], None] = lambda batch: None
    ) -> None:
        self._shape = shape
        self._nan_token = nan_token
        self._on_step = on_step
        self._slots: dict[int, Slot] = {}
        self._cache = [[0] * shape.block_size for _ in range(shape.num_blocks)]
        self.in_flight: deque[FakePending] = deque()
        self.max_in_flight = 0
        self.num_prefilled: dict[tuple[int, ...], int] = {}
        """Prompt tokens computed, by prompt."""

    @property
    def shape(self) -> RunnerShape:
        return self._shape

    def launch(self, batch: Batch) -> FakePending:
        assert batch.rows, "an empty step"
        assert batch.num_tokens == sum(row.num_tokens for row in batch.rows) <= self._shape.max_batch_tokens
        assert len({row.slot for row in batch.rows}) == len(batch.rows), "two rows of one slot"
        pending = FakePending(self, batch)
        self.in_flight.append(pending)
        self.max_in_flight = max(self.max_in_flight, len(self.in_flight))
        return pending

    def compute(self, batch: Batch) -> Sampled:
        self._on_step(batch)
        for row in batch.rows:
            self._take_in(row)
        most = self._shape.max_generated_tokens
        assert most is None or sum(map(self._num_generated, batch.rows)) <= most, "too many tokens behind their prompts"
        self._check_no_shared_writes(batch)
        for row in batch.rows:
            self._write(row)
        sampled = Sampled()
        wanting = [row for row in batch.rows if row.wants_token]
        for row in wanting:
            self._sample(self._slots[row.slot], sampled)
        if any(self._slots[row.slot].admission.sampling.num_logprobs != NO_LOGPROBS for row in wanting):
            sampled.logprobs.extend(self._logprobs(self._slots[row.slot]) for row in wanting)
        return sampled

    def _take_in(self, row: Row) -> None:
        assert 0 <= row.slot < self._shape.num_slots
        assert row.num_tokens > 0
        if row.admission is not None:
            token_ids = list(row.admission.token_ids)
            self._slots[row.slot] = Slot(token_ids, row.admission, num_computed=row.start)
        slot = self._slots[row.slot]
        slot.table.extend(row.new_block_ids)
        end = row.start + row.num_tokens
        assert row.start == slot.num_computed, "a row continues where its slot stopped"
        assert end <= len(slot.token_ids), "computed beyond what is known"
        assert row.wants_token == (end == len(slot.token_ids)), "a token is drawn exactly where the known ones end"
        assert len(slot.table) == -(-end // self._shape.block_size), "the blocks cover the positions, and no more"
        assert len(set(slot.table)) == len(slot.table), "a block twice in a table"

    def _num_generated(self, row: Row) -> int:
        num_prompt = self._slots[row.slot].admission.num_prompt
        return max(0, row.start + row.num_tokens - max(row.start, num_prompt))

    def _check_no_shared_writes(self, batch: Batch) -> None:
        size = self._shape.block_size
        writers: dict[int, int] = {}
        for row in batch.rows:
            for position in range(row.start, row.start + row.num_tokens):
                block = self._slots[row.slot].table[position // size]
                assert writers.setdefault(block, row.slot) == row.slot, "two rows write one block"
        for row in batch.rows:
            for block in self._slots[row.slot].table:
                assert writers.get(block, row.slot) == row.slot, "a row writes what another one reads"

    def _write(self, row: Row) -> None:
        """Reads the whole cache of the sequence, as attention does, and adds the new positions to it."""
        slot, size = self._slots[row.slot], self._shape.block_size
        end = row.start + row.num_tokens
        for position in range(len(slot.histories), end):
            previous = slot.histories[-1] if slot.histories else 0
            slot.histories.append(chain(previous, slot.token_ids[position]))
        for position in range(row.start):
            held = self._cache[slot.table[position // size]][position % size]
            assert held == self._kept(slot, position), f"position {position} of slot {row.slot} holds something else"
        for position in range(row.start, end):
            self._cache[slot.table[position // size]][position % size] = self._kept(slot, position)
        slot.num_computed = end
        prompt = tuple(slot.token_ids[: slot.admission.num_prompt])
        self.num_prefilled[prompt] = self.num_prefilled.get(prompt, 0) + max(0, min(end, len(prompt)) - row.start)

    def _kept(self, slot: Slot, position: int) -> int:
        is_apart = self._shape.max_generated_tokens is not None and position >= slot.admission.num_prompt
        return slot.histories[position] + is_apart

    def _sample(self, slot: Slot, sampled: Sampled) -> None:
        admission = slot.admission
        num_new = len(slot.token_ids) - admission.num_prompt
        banned = admission.end_token_ids if num_new < admission.min_new_tokens else ()
        token_id = draw(slot.histories[-1], admission.sampling.seed, self._shape.vocab_size, banned)
        sampled.is_finite.append(self._nan_token not in slot.token_ids)
        sampled.token_ids.append(token_id)
        slot.token_ids.append(token_id)

    @staticmethod
    def _logprobs(slot: Slot) -> TokenLogprobs | None:
        num = slot.admission.sampling.num_logprobs
        return None if num == NO_LOGPROBS else TokenLogprobs(-0.5, list(range(num)), [-1.0] * num)


def expected_tokens(
    prompt: Sequence[int],
    max_new: int,
    sampling: Sampling,
    end_token_ids: Sequence[int] = (),
    min_new: int = 0,
    vocab_size: int = SHAPE.vocab_size,
) -> list[int]:
    """What an undisturbed sequence draws."""
    history = 0
    for token_id in prompt:
        history = chain(history, token_id)
    drawn: list[int] = []
    while len(drawn) < max_new:
        token_id = draw(history, sampling.seed, vocab_size, end_token_ids if len(drawn) < min_new else ())
        drawn.append(token_id)
        history = chain(history, token_id)
        if token_id in end_token_ids and len(drawn) > min_new:
            break
    return drawn
