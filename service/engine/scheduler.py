"""Decides what each step computes, and takes in what it drew. Owns the sequences and all their progress.

It does not know how a step is computed, nor who asked. `schedule` works on lengths only, never on token values, so a
step can be chosen while the step before is still in flight; `commit` brings the values. There is one rule for tokens:
a step gives each sequence min(tokens not computed yet, its share). Chunked prefill, prefix hits, resumption after a
preemption and decoding are all that rule.

    add ──► waiting ──admit──► running ──finish──► leaving ──► gone      leaving: a step in flight still uses the
               ▲                  │                   ▲                  blocks and the slot; without one, a sequence
               └───── leaving ◄─preempt               └── cancel         passes through at once
"""

from __future__ import annotations

import collections.abc
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from operator import attrgetter

from model.interface import Admission, Batch, Row, Sampled, TokenLogprobs
from service.engine.block_pool import BlockPool
from service.engine.budget import PrefillBudget
from service.engine.messages import NO_TOKEN, NOT_ENDED, FinishCode, Start
from service.engine.outcomes import Counters, Outcomes
from service.engine.policy import last_in_order
from service.engine.sequence import NO_SLOT, Sequence, State

PickVictim = Callable[[collections.abc.Sequence[Sequence]], Sequence]

_rank = attrgetter("rank")


@dataclass(slots=True)
class Room:
    """What a step has room for beside its rows of one token."""

    num_tokens: int
    num_generated: int
    """Of these, how many may lie behind their sequences' prompts."""

    def most(self, sequence: Sequence, start: int) -> int:
        """Tokens that it has room for of this sequence from `start` on."""
        return min(self.num_tokens, max(sequence.num_prompt - start, 0) + self.num_generated)

    def take(self, sequence: Sequence, start: int, num_tokens: int) -> None:
        """Gives room to that many tokens."""
        self.num_tokens -= num_tokens
        self.num_generated -= max(start + num_tokens - max(start, sequence.num_prompt), 0)


class Scheduler:
    """Continuous batching over a block pool."""

    def __init__(
        self,
        pool: BlockPool,
        budget: PrefillBudget,
        num_slots: int,
        max_batch_tokens: int,
        pick_victim: PickVictim = last_in_order,
        max_generated_tokens: int | None = None,
    ) -> None:
        self.pool = pool
        self.budget = budget
        self._outcomes = Outcomes()
        self._counters = Counters()
        self._pick_victim = pick_victim
        # Every running sequence can have a token in every step, so none starves for want of budget.
        self._num_slots = min(num_slots, max_batch_tokens)
        self._max_generated_tokens = max_batch_tokens if max_generated_tokens is None else max_generated_tokens
        assert self._max_generated_tokens >= self._num_slots, "every running sequence can decode in every step"
        self._free_slots = list(reversed(range(self._num_slots)))
        self._by_slot: dict[int, Sequence] = {}
        self._open: dict[int, Sequence] = {}
        self._no_deadline_before = inf
        """No open sequence has an earlier deadline than this."""
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._leaving: set[Sequence] = set()
        self._only_decodes = True

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without a place in the steps, those that a preemption is sending back included."""
        return len(self._open) - len(self._running)

    @property
    def num_waiting_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something: compute, commit or tell."""
        return bool(self._open or self._leaving or self._outcomes)

    @property
    def has_outcomes(self) -> bool:
        """Whether `take` would give any outcome."""
        return bool(self._outcomes)

    @property
    def expects_prompts(self) -> bool:
        """Whether the step chosen last has a part of a prompt, or the next one may start one.

        That one can, where a slot is free: whether there are blocks for it is not looked into.
        """
        return not self._only_decodes or bool(self._waiting and self._free_slots)

    def __contains__(self, sequence_id: int) -> bool:
        """Whether the sequence has not ended."""
        return sequence_id in self._open

    def add(self, sequence: Sequence) -> None:
        """Takes a new sequence into the queue, at its rank."""
        assert sequence.id not in self._open, "ids are unique among open sequences"
        self._open[sequence.id] = sequence
        self._no_deadline_before = min(self._no_deadline_before, sequence.limits.deadline)
        insort(self._waiting, sequence, key=_rank)

    def refuse(self, sequence_id: int) -> None:
        """Ends a sequence that was never added."""
        self._outcomes.add(sequence_id, NO_TOKEN, FinishCode.REFUSED, 0, None)

    def end(self, sequence_ids: Iterable[int], code: FinishCode) -> None:
        """Ends these sequences at once, wherever they are. Those that have ended already are left alone."""
        for sequence_id in sequence_ids:
            if sequence_id in self._open:
                self._finish(self._open[sequence_id], code)

    def schedule(self, now: float) -> Batch:
        """The next step. Sequences past their deadline end first; then the running go on; then the waiting start."""
        self._expire(now)
        rows: list[Row] = []
        self._admit(rows, self._continue(rows), now)
        num_tokens = sum([row.num_tokens for row in rows])
        self._only_decodes = num_tokens == len(rows)
        return Batch(rows, num_tokens)

    def commit(self, batch: Batch, sampled: Sampled) -> None:
        """Takes in an ended step: its tokens, the blocks it filled, and whatever only it still held."""
        drawn = 0
        # What hundreds of rows ask for is looked up once; in Python 3.11 an enum's member costs as much as a call.
        by_slot, token_ids, add = self._by_slot, sampled.token_ids, self._outcomes.add
        finished, block_size = State.FINISHED, self.pool.block_size
        for row in batch.rows:
            sequence, wants_token = by_slot[row.slot], row.wants_token
            sequence.num_in_flight -= 1
            if sequence.state is finished:
                self._counters.dropped_tokens += row.num_tokens
            elif wants_token and not sampled.is_finite[drawn]:
                # The cause may lie in any block that the row read, so none of them may be found again.
                self.pool.withdraw(sequence.block_table)
                self._finish(sequence, FinishCode.NON_FINITE)
            else:
                if row.start % block_size + row.num_tokens >= block_size:
                    self._publish(sequence, row.start + row.num_tokens)
                if wants_token:
                    token_id = token_ids[drawn]
                    logprobs = sampled.logprobs[drawn] if sampled.logprobs else None
                    code = sequence.accept(token_id)
                    if code is None:
                        add(sequence.id, token_id, NOT_ENDED, sequence.num_preemptions, logprobs)
                    else:
                        self._finish(sequence, code, token_id, logprobs)
            drawn += wants_token
            if self._leaving and sequence in self._leaving and not sequence.num_in_flight:
                self._leaving.remove(sequence)
                self._let_go(sequence)
        assert drawn == len(sampled.token_ids), "a step draws one token for each row that wants one"

    def take(self) -> tuple[Outcomes, Counters]:
        """What happened since the last call."""
        taken = self._outcomes, self._counters
        self._outcomes, self._counters = Outcomes(), Counters()
        return taken

    def _expire(self, now: float) -> None:
        if now < self._no_deadline_before:
            return
        for sequence in [one for one in self._open.values() if one.limits.deadline <= now]:
            self._finish(sequence, FinishCode.DEADLINE)
        self._no_deadline_before = min((one.limits.deadline for one in self._open.values()), default=inf)

    def _continue(self, rows: list[Row]) -> Room:
        """Adds the rows of running sequences that can have blocks. Returns what room is left.

        A row of one token needs none of it: the budget set those aside.
        """
        order = tuple(self._running)
        uncomputed = [sequence.num_uncomputed for sequence in order]
        num_single = uncomputed.count(1)
        room = Room(self.budget.share(num_single), self._max_generated_tokens - num_single)
        running, block_size = State.RUNNING, self.pool.block_size
        for index, sequence in enumerate(order):
            num_uncomputed = uncomputed[index]
            num_tokens = 1
            if num_uncomputed != 1:
                num_tokens = min(num_uncomputed, room.most(sequence, sequence.num_computed))
            if num_tokens == 0 or sequence.state is not running:
                continue
            block_ids: collections.abc.Sequence[int] | None = ()
            if sequence.num_computed + num_tokens > block_size * len(sequence.block_table):
                block_ids = self._grow(sequence, num_tokens, order[index:])
            if block_ids is None:
                continue
            if num_uncomputed > 1:
                room.take(sequence, sequence.num_computed, num_tokens)
            rows.append(self._row(sequence, num_tokens, block_ids))
        return room

    def _grow(
        self, sequence: Sequence, num_tokens: int, no_earlier: collections.abc.Sequence[Sequence]
    ) -> collections.abc.Sequence[int] | None:
        """New blocks for the next tokens, if need be taken from sequences no earlier in order; None: not this step."""
        num_blocks = self.pool.blocks_for(sequence.num_computed + num_tokens) - len(sequence.block_table)
        if num_blocks <= 0:
            return ()
        while num_blocks > self.pool.num_allocatable:
            if self._leaving:
                return None  # blocks are on their way: they come when the step in flight ends
            victim = self._pick_victim([one for one in no_earlier if one.state is State.RUNNING])
            self._preempt(victim)
            if victim is sequence:
                return None
        block_ids = self.pool.allocate(num_blocks)
        sequence.block_table += block_ids
        return block_ids

    def _admit(self, rows: list[Row], room: Room, now: float) -> None:
        """Starts waiting sequences, strictly in order, while slots, blocks and room last.

        One starts where all its tokens can have blocks beside what is promised to the running: more would only be
        preempted again, or take what a running one waits for. With nothing running it comes down to the pool's size.
        """
        if not (room.num_tokens > 0 and self._waiting and self._free_slots):
            return
        promised = self._promised_blocks(self._running)
        while room.num_tokens > 0 and self._waiting and self._free_slots:
            sequence = self._waiting[0]
            cached = self._find_prefix(sequence)
            most = room.most(sequence, len(cached) * self.pool.block_size)
            if most == 0 or promised + self._needed_blocks(sequence, cached) > self.pool.num_allocatable:
                return
            del self._waiting[0]
            self._start(sequence, cached, now)
            num_tokens = min(sequence.num_uncomputed, most)
            new = self._grow(sequence, num_tokens, (sequence,))
            assert new is not None, "whoever fits gets its blocks"
            room.take(sequence, sequence.num_computed, num_tokens)
            rows.append(self._row(sequence, num_tokens, (*cached, *new), sequence.admission()))
            promised += self._promised_blocks([sequence])

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Published blocks that begin the sequence. At least one token is left to compute, so that logits exist."""
        if sequence.cache_root is None:
            return []
        most = (len(sequence.token_ids) - 1) // self.pool.block_size
        self._name_blocks(sequence, sequence.cache_root, most)
        return self.pool.match(sequence.digests[:most], sequence.token_ids)

    def _name_blocks(self, sequence: Sequence, cache_root: bytes, num_blocks: int) -> None:
        """Has the sequence know the digests of its first blocks."""
        self.pool.extend_digests(sequence.digests, cache_root, sequence.token_ids, sequence.num_prompt, num_blocks)

    def _promised_blocks(self, sequences: Iterable[Sequence]) -> int:
        """Blocks that these will still take for the tokens that exist, and one more for each."""
        size = self.pool.block_size
        # A call of blocks_for for each would be most of the time.
        return sum([1 - (-one.num_tokens // size) - len(one.block_table) for one in sequences])

    def _needed_blocks(self, sequence: Sequence, cached: list[int]) -> int:
        """Allocatable blocks that a waiting sequence would take for its tokens, cached ones of its prefix included."""
        return self.pool.blocks_for(len(sequence.token_ids)) - len(cached) + self.pool.num_unreferenced(cached)

    def _start(self, sequence: Sequence, cached: list[int], now: float) -> None:
        """Gives a waiting sequence its slot and the blocks of its cached prefix."""
        num_cached = len(cached) * self.pool.block_size
        self.pool.acquire(cached)
        sequence.block_table = list(cached)
        sequence.num_published = len(cached)
        sequence.num_computed = num_cached
        sequence.slot = self._free_slots.pop()
        self._by_slot[sequence.slot] = sequence
        sequence.state = State.RUNNING
        insort(self._running, sequence, key=_rank)
        if sequence.cache_root is not None:
            self._counters.prefix_query_tokens += len(sequence.token_ids)
            self._counters.prefix_hit_tokens += num_cached
        if not sequence.has_started:
            sequence.has_started = True
            self._outcomes.starts.append(Start(sequence.id, now, num_cached))

    def _row(
        self,
        sequence: Sequence,
        num_tokens: int,
        block_ids: collections.abc.Sequence[int],
        admission: Admission | None = None,
    ) -> Row:
        """The sequence's row of this step. Its progress counts from here on; the step in flight owes it."""
        start = sequence.num_computed
        sequence.num_computed += num_tokens
        wants_token = sequence.num_computed == sequence.num_tokens
        sequence.num_tokens += wants_token
        sequence.num_in_flight += 1
        return Row(sequence.slot, start, num_tokens, block_ids, wants_token, admission)

    def _publish(self, sequence: Sequence, num_computed: int) -> None:
        """Names the blocks that an ended step filled. All their tokens are known: each was the step's input."""
        size = self.pool.block_size
        num_full = num_computed // size
        if sequence.cache_root is None or num_full <= sequence.num_published:
            return
        self._name_blocks(sequence, sequence.cache_root, num_full)
        for index in range(sequence.num_published, num_full):
            token_ids = sequence.token_ids[index * size : (index + 1) * size]
            self.pool.publish(sequence.block_table[index], sequence.digests[index], token_ids)
        sequence.num_published = num_full

    def _finish(
        self,
        sequence: Sequence,
        code: FinishCode,
        token_id: int = NO_TOKEN,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """The one end of every sequence."""
        del self._open[sequence.id]
        was = sequence.state
        sequence.state, sequence.finish = State.FINISHED, code
        self._outcomes.add(sequence.id, token_id, code, sequence.num_preemptions, logprobs)
        if was is State.WAITING:
            self._waiting.remove(sequence)
        elif was is State.RUNNING:
            self._leave(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's blocks; it waits again, and recomputes what the prefix cache has lost by then."""
        sequence.state = State.PREEMPTED
        sequence.num_preemptions += 1
        self._counters.num_preemptions += 1
        self._counters.recomputed_tokens += sequence.num_computed
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running: blocks and slot go back now, or when the last step in flight that uses them has ended."""
        self._running.remove(sequence)
        if sequence.num_in_flight:
            self._leaving.add(sequence)
        else:
            self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        del self._by_slot[sequence.slot]
        self._free_slots.append(sequence.slot)
        sequence.slot = NO_SLOT
        sequence.block_table = []
        sequence.num_published = sequence.num_computed = 0
        if sequence.state is State.PREEMPTED:
            sequence.state = State.WAITING
            insort(self._waiting, sequence, key=_rank)

    def check(self) -> None:
        """Asserts every invariant. Linear in the pool: for tests, after every step."""
        holders = [*self._running, *self._leaving]
        self.pool.check(sequence.block_table for sequence in holders)
        assert sorted(self._free_slots + [one.slot for one in holders]) == list(range(self._num_slots)), "slots leak"
        assert all(self._by_slot[one.slot] is one for one in holders), "a slot leads to another sequence"
        assert [*map(_rank, self._running)] == sorted(map(_rank, self._running)), "running is out of order"
        assert [*map(_rank, self._waiting)] == sorted(map(_rank, self._waiting)), "waiting is out of order"
        for sequence in self._waiting:
            assert sequence.state is State.WAITING, "waiting in another state"
            assert not (sequence.num_in_flight or sequence.num_drawing), "waiting with a step in flight"
            assert not (sequence.block_table or sequence.num_computed), "waiting with blocks"
            assert sequence.slot == NO_SLOT, "waiting with a slot"
        deadlines = [one.limits.deadline for one in self._open.values()]
        assert self._no_deadline_before <= min(deadlines, default=inf), "a deadline would be missed"
        for sequence in holders:
            assert sequence.num_computed <= sequence.num_tokens <= sequence.max_tokens, "computed beyond its tokens"
            is_owed = 0 <= sequence.num_drawing <= sequence.num_in_flight
            assert is_owed or sequence.state is State.FINISHED, "draws that no step in flight owes"
            assert len(sequence.block_table) == self.pool.blocks_for(sequence.num_computed), "table length"
            assert sequence.num_published * self.pool.block_size <= sequence.num_computed, "published before computed"
        assert all(sequence.num_in_flight for sequence in self._leaving), "left, but not let go"

    def check_idle(self) -> None:
        """Asserts that nothing is held when nothing is open. Constant time: for production, whenever idle."""
        assert len(self._free_slots) == self._num_slots, "an idle engine holds slots"
        self.pool.check_unused()
