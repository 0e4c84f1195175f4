"""The block pool against a model of it: what each block holds, and who holds it."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from service.engine.block_pool import BlockPool, chain_digest, root_digest

NUM_BLOCKS = 12
SIZE = 2


class PoolMachine(RuleBasedStateMachine):
    """Tables are written as a sequence would: match, acquire, allocate, publish what is full, release."""

    tables: Bundle[list[int]] = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, SIZE)
        self.held: list[list[int]] = []
        self.content: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        """Root and whole prefix that were last written to each block."""

    @rule(
        target=tables,
        root=st.sampled_from([b"a", b"b"]),
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        publishes=st.booleans(),
    )
    def open_table(self, root: bytes, token_ids: list[int], publishes: bool) -> object:
        digests: list[bytes] = []
        num_full = len(token_ids) // SIZE
        self.pool.extend_digests(digests, root, token_ids, len(token_ids), num_full)
        cached = self.pool.match(digests, token_ids)
        for index, block_id in enumerate(cached):
            assert self.content[block_id] == (root, tuple(token_ids[: (index + 1) * SIZE])), "a hit holds the prefix"
        num_new = self.pool.blocks_for(len(token_ids)) - len(cached)
        if num_new + self.pool.num_unreferenced(cached) > self.pool.num_allocatable:
            return multiple()
        self.pool.acquire(cached)
        table = cached + self.pool.allocate(num_new)
        for index in range(len(cached), len(table)):
            self.content[table[index]] = (root, tuple(token_ids[: (index + 1) * SIZE]))
            if publishes and index < num_full:
                self.pool.publish(table[index], digests[index], token_ids[index * SIZE : (index + 1) * SIZE])
        if publishes:
            assert len(self.pool.match(digests, token_ids)) == num_full, "what was published is found"
        self.held.append(table)
        return table

    @rule(table=tables)
    def release(self, table: list[int]) -> None:
        if any(one is table for one in self.held):
            self.held = [one for one in self.held if one is not table]
            self.pool.release(table)

    @rule(table=tables)
    def release_too_often(self, table: list[int]) -> None:
        if not any(block_id in one for one in self.held for block_id in table):
            with pytest.raises(AssertionError):
                self.pool.release(table)

    @rule(table=tables)
    def withdraw(self, table: list[int]) -> None:
        if any(one is table for one in self.held):
            self.pool.withdraw(table)

    @rule()
    def release_all(self) -> None:
        for table in self.held:
            self.pool.release(table)
        self.held.clear()
        self.pool.check_unused()

    @invariant()
    def is_sound(self) -> None:
        self.pool.check(self.held)
        referenced = {block_id for table in self.held for block_id in table}
        assert len(referenced) + self.pool.num_allocatable == NUM_BLOCKS

    def teardown(self) -> None:
        self.release_all()
        assert sorted(self.pool.allocate(NUM_BLOCKS)) == list(range(NUM_BLOCKS)), "every block can be had again"
        assert self.pool.num_cached == 0


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def published(pool: BlockPool, token_ids: list[int]) -> list[int]:
    """A table of full blocks, published under one root."""
    digests: list[bytes] = []
    num_blocks = len(token_ids) // pool.block_size
    pool.extend_digests(digests, b"", token_ids, len(token_ids), num_blocks)
    table = pool.allocate(num_blocks)
    for index, block_id in enumerate(table):
        pool.publish(block_id, digests[index], token_ids[index * pool.block_size : (index + 1) * pool.block_size])
    return table


def find(pool: BlockPool, token_ids: list[int], num_prompt: int = 99) -> list[int]:
    digests: list[bytes] = []
    pool.extend_digests(digests, b"", token_ids, num_prompt, len(token_ids) // pool.block_size)
    return pool.match(digests, token_ids)


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(4, 2)
    table = published(pool, [1, 2, 3, 4, 5, 6])
    pool.release(table)
    pool.allocate(2)  # one nameless block, then the end of the prefix
    assert find(pool, [1, 2, 3, 4, 5, 6]) == table[:2]


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    pool = BlockPool(2, 2)
    old, young = published(pool, [1, 2]), published(pool, [3, 4])
    pool.release(old)
    pool.release(young)
    pool.acquire(old)  # used again
    pool.release(old)
    pool.allocate(1)
    assert find(pool, [1, 2]) == old
    assert find(pool, [3, 4]) == []


def test_nameless_blocks_go_before_any_prefix() -> None:
    pool = BlockPool(3, 2)
    prefix = published(pool, [1, 2])
    pool.release(prefix)
    pool.release(pool.allocate(2))
    pool.allocate(2)
    assert find(pool, [1, 2]) == prefix


def test_a_hit_compares_token_ids() -> None:
    pool = BlockPool(2, 2)
    block_id = pool.allocate(1)[0]
    digest = chain_digest(root_digest(b""), [1, 2], 2)
    pool.publish(block_id, digest, [8, 9])  # as if another content had the same digest
    assert pool.match([digest], [1, 2]) == []


def test_a_digest_covers_what_comes_before() -> None:
    assert chain_digest(root_digest(b"a"), [1, 2], 2) != chain_digest(root_digest(b"b"), [1, 2], 2)
    pool = BlockPool(4, 2)
    published(pool, [1, 2, 3, 4])
    assert find(pool, [9, 9, 3, 4]) == []


@pytest.mark.parametrize("keeps_apart", [False, True])
def test_generated_tokens_are_apart_from_prompts_where_they_must_be(keeps_apart: bool) -> None:
    pool = BlockPool(4, 2, keeps_apart=keeps_apart)
    table = published(pool, [1, 2, 3, 4, 5, 6])
    for num_prompt, num_found in ((9, 3), (6, 3), (5, 2), (4, 2), (3, 1), (2, 1), (1, 0), (0, 0)):
        assert find(pool, [1, 2, 3, 4, 5, 6], num_prompt) == table[: num_found if keeps_apart else 3]


def test_a_prefix_named_in_parts_has_the_same_names() -> None:
    pool, whole, parts = BlockPool(4, 2, keeps_apart=True), list[bytes](), list[bytes]()
    pool.extend_digests(whole, b"", [1, 2, 3, 4, 5, 6], 3, 3)
    for num_blocks in (1, 2, 3):
        pool.extend_digests(parts, b"", [1, 2, 3, 4, 5, 6], 3, num_blocks)
    assert parts == whole


def test_the_second_block_of_one_content_stays_nameless() -> None:
    pool = BlockPool(2, 2)
    first, second = published(pool, [1, 2]), published(pool, [1, 2])
    pool.release(first)
    pool.release(second)
    assert pool.num_cached == 1
    pool.check([])


def test_check_sees_a_leak() -> None:
    pool = BlockPool(2, 2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="references differ"):
        pool.check([])
    with pytest.raises(AssertionError, match="idle engine holds blocks"):
        pool.check_unused()


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_a_pool_needs_blocks(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(num_blocks, block_size)
