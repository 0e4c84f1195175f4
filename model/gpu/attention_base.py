"""What computes attention on a card: a plan of one step, made by the host, and one method that follows it.

It does not know how any attention computes. model/gpu/attention.py is our own, whose rows keep their bits;
model/gpu/flash_attention.py is FlashAttention-3, for who asks for it.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Attention(Protocol):
    """Attention of steps within some limits. What `attend` launches depends on the shapes of its arguments only."""

    @property
    def num_plan_words(self) -> int:
        """Words of the longest plan."""

    def plan(
        self,
        query_starts: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        prompt_lens: NDArray[np.integer[Any]],
        tables_R: NDArray[np.integer[Any]] | None = None,
    ) -> NDArray[np.int32]:
        """The plan of a step, int32, one dimension, for the host to bring to the device.

        Row r brings the query tokens [query_starts[r], query_starts[r + 1]), the last of its context_lens[r] positions,
        of which the first prompt_lens[r] are its prompt's; its block table is number tables_R[r], such as its slot, or
        number r where none are given. Raises ValueError for a step beyond the limits.
        """

    def attend(
        self,
        q_THD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        out_THD: Tensor,
        *,
        is_decode_only: bool,
        plan: Tensor,
    ) -> None:
        """Attention of one layer, into `out_THD`; what stands there for tokens of padding is not defined.

        `q_THD` and `out_THD` [T, H, D] are contiguous, and so are the caches [num_blocks, K, block_size, D];
        `block_tables` int32 [tables, blocks]; `plan` begins with the step's. `is_decode_only` says that no row has more
        than one token, or a token of its prompt.
        """
