"""FlashAttention-3 in the place of our own attention, where it is installed and asked for.

It owns the call of `flash_attn_interface`, a package that is built from the folder hopper of Dao-AILab/flash-attention,
and the plan that this call reads. Nothing falls back: what the package cannot do is refused at the start. It picks the
number of splits of a row's positions by all rows of the step, so that a row's last bits may depend on the load.

A plan is constant in its length, so that a captured step reads the same shapes whatever its rows; rows that there are
not have no tokens and no context. With R for the most rows:

    | query starts [R + 1] | context lengths [R], one unused | numbers of the block tables [R], one unused |

Tables are found by their number (`cache_batch_idx`), the cache is given as a view [num_blocks, block_size, K, D].

Nobody has run it here yet: on a card, the tests marked gpu and `make gpu-check ARGS="--only attention"` do. Its source
(hopper/flash_api.cpp, since early 2025) says:

- Any block size and uneven strides of the cache are taken, rows without tokens too. With constant shapes the call can
  be captured: what it launches depends on them, and the splits are picked on the device.
- The public function takes no place for its result, so that a copy follows. Its result and its partial results are
  torch's temporaries, which come out of the runner's reserve. It has no sinks.
- Prompts are read by TMA only where block_size is a multiple of its tile of keys, 128 for heads of 64 or 128. Blocks
  are then read to their end: a value there that is no number, left by a broken sequence, spoils the next one's row.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.gpu.attention import Heads

MODULE = "flash_attn_interface"
DTYPE = torch.bfloat16
"""Of those that a runner computes in, the one that it takes."""
MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8
CAPABILITY = 9
"""Of a card that its kernels are made for, before the point."""


def find_fault(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Why it does not compute here, in a few words; None where it may."""
    if dtype is not DTYPE:
        return f"FlashAttention-3 computes bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > MAX_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLE:
        return f"FlashAttention-3 takes heads of multiples of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}, not {head_dim}"
    major, minor = capability
    if major != CAPABILITY:
        return f"FlashAttention-3 is for cards of compute capability {CAPABILITY}.x, this one has {major}.{minor}"
    try:
        import_module(MODULE).flash_attn_with_kvcache  # noqa: B018
    except (ImportError, OSError, AttributeError) as error:
        return f"{MODULE} cannot be used: {_first_line(error)}"
    return None


class FlashAttention:
    """Attention of steps of at most `max_rows` rows. See model.gpu.attention_base.Attention."""

    def __init__(self, heads: Heads, max_rows: int, device: torch.device) -> None:
        """Computes once, where `find_fault` has found none.

        Raises ValueError where the package is of another time, or was built without a part that is needed.
        """
        self._heads, self._max_rows = heads, max_rows
        self._compute: Any = import_module(MODULE).flash_attn_with_kvcache
        try:
            self._try_out(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{MODULE} does not do what it is asked for: {_first_line(error)}") from None

    @property
    def num_plan_words(self) -> int:
        """See Attention."""
        return 3 * (self._max_rows + 1)

    def plan(
        self,
        query_starts: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        prompt_lens: NDArray[np.integer[Any]],
        tables_R: NDArray[np.integer[Any]] | None = None,
    ) -> NDArray[np.int32]:
        """See Attention. Prompts and what follows are computed alike."""
        num_rows = len(context_lens)
        if num_rows > self._max_rows:
            raise ValueError(f"{num_rows} rows: at most {self._max_rows} are planned for")
        words = np.zeros((3, self._max_rows + 1), np.int32)
        starts, contexts, tables = words
        starts[: num_rows + 1], starts[num_rows + 1 :] = query_starts, query_starts[-1]
        contexts[:num_rows] = context_lens
        tables[:num_rows] = np.arange(num_rows) if tables_R is None else tables_R
        return words.ravel()

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
        """See Attention."""
        heads, num_tokens = self._heads, len(q_THD)
        starts, contexts, tables = plan[: self.num_plan_words].view(3, -1)
        num_rows = min(self._max_rows, num_tokens)  # each has a token
        result_THD = self._compute(
            q_THD,
            k_cache.transpose(1, 2),
            v_cache.transpose(1, 2),
            cache_seqlens=contexts[:num_rows],
            cache_batch_idx=tables[:num_rows],
            page_table=block_tables,
            cu_seqlens_q=starts[: num_rows + 1],
            max_seqlen_q=1 if is_decode_only else num_tokens,
            softmax_scale=heads.scale,
            causal=True,
            window_size=(-1, -1) if heads.window is None else (heads.window - 1, 0),
            softcap=heads.soft_cap,
        )
        out_THD.copy_(result_THD)

    def _try_out(self, device: torch.device) -> None:
        """A step of one token of padding and one that sees itself, as both kinds of step."""
        heads = self._heads
        q_THD = torch.zeros(2, heads.num_heads, heads.head_dim, dtype=DTYPE, device=device)
        place = 1, heads.num_kv_heads, heads.block_size, heads.head_dim
        k_cache, v_cache = (torch.zeros(place, dtype=DTYPE, device=device) for _ in range(2))
        block_tables = torch.zeros(1, 1, dtype=torch.int32, device=device)
        lengths = np.array([0, 1], np.int32), np.array([1], np.int32), np.array([1])
        plan = torch.from_numpy(self.plan(*lengths)).to(device)
        for is_decode_only in (True, False):
            out_THD = torch.empty_like(q_THD)
            self.attend(q_THD, k_cache, v_cache, block_tables, out_THD, is_decode_only=is_decode_only, plan=plan)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
