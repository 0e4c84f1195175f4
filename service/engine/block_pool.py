"""Owns the blocks of the key/value pool: who references them, which are free, which hold a prefix worth finding.

It does not know sequences, steps or tensors. A block is in exactly one of three places:

    referenced      ref_count > 0, in that many block tables; named by a digest once it is full and published
    cached          ref_count = 0, still named: the next sequence with this prefix finds it, until it is allocated
    free            ref_count = 0, no name

The last two share one list in eviction order: nameless blocks first, then the least recently used prefix. A digest is
chained: it covers the block's tokens and, through the digest before, its whole prefix and the cache root. Where a
runner's generated tokens may have other bits than a prompt's, it covers too how many of the tokens were a prompt's.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

DIGEST_BYTES = 16


@dataclass(slots=True)
class Block:
    """One block. `token_ids` are what it was published with, so that a hit compares more than a digest."""

    id: int
    ref_count: int = 0
    digest: bytes | None = None
    token_ids: tuple[int, ...] = ()


def root_digest(cache_root: bytes) -> bytes:
    """The digest before the first block: prefixes of different roots never meet."""
    return blake2b(cache_root, digest_size=DIGEST_BYTES, person=b"root").digest()


def chain_digest(previous: bytes, token_ids: Sequence[int], num_prompt: int) -> bytes:
    """The digest of a full block that follows `previous`, and whose first `num_prompt` tokens are a prompt's."""
    words = array("I", token_ids)
    if num_prompt < len(words):
        words.append(num_prompt)
    return blake2b(previous + words.tobytes(), digest_size=DIGEST_BYTES).digest()


class BlockPool:
    """Blocks 0 to num_blocks - 1, each of block_size positions."""

    def __init__(self, num_blocks: int, block_size: int, *, keeps_apart: bool = False) -> None:
        """With `keeps_apart`, a block of generated tokens has another name than one of the same tokens in a prompt."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError("a pool needs at least one block of at least one position")
        self.block_size = block_size
        self._keeps_apart = keeps_apart
        self._blocks = [Block(index) for index in range(num_blocks)]
        self._unreferenced: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_digest: dict[bytes, Block] = {}
        self._num_cached = 0

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_allocatable(self) -> int:
        """Blocks that `allocate` can give: free and cached ones."""
        return len(self._unreferenced)

    @property
    def num_cached(self) -> int:
        """Blocks that hold only a reusable prefix."""
        return self._num_cached

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that this many positions take."""
        return -(-num_tokens // self.block_size)

    def extend_digests(
        self, digests: list[bytes], cache_root: bytes, token_ids: Sequence[int], num_prompt: int, num_blocks: int
    ) -> None:
        """Makes `digests` name at least the first `num_blocks` blocks of these tokens, all of them full."""
        size = self.block_size
        num_left = num_prompt - len(digests) * size if self._keeps_apart else len(token_ids)
        previous = digests[-1] if digests else root_digest(cache_root)
        new_ids = array("I", token_ids[len(digests) * size : num_blocks * size])
        for start in range(0, len(new_ids), size):
            of_prompt = min(max(num_left - start, 0), size)
            previous = chain_digest(previous, new_ids[start : start + size], of_prompt)
            digests.append(previous)

    def match(self, digests: Sequence[bytes], token_ids: Sequence[int]) -> list[int]:
        """The longest run of published blocks, from the first on, with these digests and these tokens.

        Takes no reference: `acquire` does.
        """
        size = self.block_size
        found = []
        for index, digest in enumerate(digests):
            block = self._by_digest.get(digest)
            if block is None or block.token_ids != tuple(token_ids[index * size : (index + 1) * size]):
                break
            found.append(block.id)
        return found

    def num_unreferenced(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks count among the allocatable ones."""
        return sum(block_id in self._unreferenced for block_id in block_ids)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """References published blocks once more."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            assert block.digest is not None, "only a published block can be shared"
            if block.ref_count == 0:
                del self._unreferenced[block_id]
                self._num_cached -= 1
            block.ref_count += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes blocks for writing: nameless ones first, then the least recently used prefixes, which are forgotten."""
        assert num_blocks <= len(self._unreferenced), "the caller makes room first"
        return [self._allocate_one() for _ in range(num_blocks)]

    def _allocate_one(self) -> int:
        block_id, _ = self._unreferenced.popitem(last=False)
        block = self._blocks[block_id]
        if block.digest is not None:
            self._num_cached -= 1
            self._forget(block)
        block.ref_count = 1
        return block_id

    def release(self, block_ids: Sequence[int]) -> None:
        """Gives up one reference to each. Last to first, so that the front of a prefix is evicted after its end."""
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            assert block.ref_count > 0, "a block is released as often as it was taken"
            block.ref_count -= 1
            if block.ref_count:
                continue
            self._unreferenced[block_id] = None
            if block.digest is None:
                self._unreferenced.move_to_end(block_id, last=False)
            else:
                self._num_cached += 1

    def publish(self, block_id: int, digest: bytes, token_ids: Sequence[int]) -> None:
        """Names a full, computed block. If another block already has the name, this one stays nameless."""
        block = self._blocks[block_id]
        assert block.ref_count > 0, "only its writer publishes a block"
        assert len(token_ids) == self.block_size, "only full blocks are published"
        if block.digest is None and digest not in self._by_digest:
            block.digest, block.token_ids = digest, tuple(token_ids)
            self._by_digest[digest] = block

    def withdraw(self, block_ids: Iterable[int]) -> None:
        """Takes the names from referenced blocks whose content must not be found again."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            assert block.ref_count > 0, "only a holder withdraws a block"
            if block.digest is not None:
                self._forget(block)

    def _forget(self, block: Block) -> None:
        assert block.digest is not None
        del self._by_digest[block.digest]
        block.digest, block.token_ids = None, ()

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts every invariant against the block tables in use. Linear in the pool: for tests."""
        references = Counter(block_id for table in tables for block_id in table)
        for block in self._blocks:
            assert block.ref_count == references[block.id], f"block {block.id}: references differ from the tables"
            assert (block.ref_count == 0) == (block.id in self._unreferenced), f"block {block.id}: in two places"
            if block.digest is None:
                assert not block.token_ids, f"block {block.id}: content without a name"
            else:
                assert self._by_digest.get(block.digest) is block, f"block {block.id}: its name leads elsewhere"
                assert len(block.token_ids) == self.block_size, f"block {block.id}: named but not full"
        named = [block_id for block_id in self._unreferenced if self._blocks[block_id].digest is not None]
        assert named == list(self._unreferenced)[self.num_allocatable - len(named) :], "nameless blocks go first"
        assert len(named) == self._num_cached, "cached blocks are miscounted"
        assert len(self._by_digest) == sum(block.digest is not None for block in self._blocks), "a name leads nowhere"
        assert references.keys() <= set(range(self.num_blocks)), "a table names a block that does not exist"

    def check_unused(self) -> None:
        """Asserts that nothing holds a block. Constant time: for whenever the engine goes idle."""
        assert len(self._unreferenced) == self.num_blocks, "an idle engine holds blocks"
        assert self._num_cached == len(self._by_digest), "cached blocks are miscounted"
