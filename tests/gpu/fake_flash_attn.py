"""What stands in for FlashAttention-3 without a card: its call, as strict as the real one, by the reference.

The names and their order are those of `flash_attn_with_kvcache` in hopper/flash_attn_interface.py, the checks those of
`mha_fwd` in hopper/flash_api.cpp for a paged cache and rows of any length; what it allows beyond what is used here (8
bits, new keys, rotation, left padding) is left out. It is one operator of torch's, as the real one, so that a device of
the tests can record it. Tokens of no row are not written: here they are no numbers.
"""

from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from model.attention.reference import attend_row, gather

DTYPES = {torch.bfloat16, torch.float16}


def check(is_so: bool, said: str) -> None:
    """As TORCH_CHECK."""
    if not is_so:
        raise RuntimeError(said)


@torch.library.custom_op("fake_flash_attn_3::fwd", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    max_seqlen_q: int,
    page_table: Tensor,
    kv_batch_idx: Tensor,
    softmax_scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    for tensor in (q, k, v):
        check(tensor.dtype in DTYPES and tensor.dtype == q.dtype, "only supports fp16, bf16, and fp8_e4m3 data type")
        check(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    total_q, num_heads, head_size = q.shape
    num_pages, page_size, num_heads_k, _ = k.shape
    batch_size = len(cu_seqlens_q) - 1
    check(page_table.dtype == torch.int32 and page_table.stride(-1) == 1, "page_table")
    for numbers in (cu_seqlens_q, seqused_k, kv_batch_idx):
        check(numbers.dtype == torch.int32 and numbers.is_contiguous(), "int32, contiguous")
    check(head_size <= 256 and head_size % 8 == 0, "head_size should be a multiple of 8")
    check(num_heads % num_heads_k == 0, "Number of heads in key/value must divide number of heads in query")
    check(k.shape == v.shape == (num_pages, page_size, num_heads_k, head_size), "k and v must have shape")
    check(len(seqused_k) == len(kv_batch_idx) == batch_size, "seqused_k must have shape (batch_size)")

    out = torch.full((total_q, num_heads, head_size), float("nan"), dtype=q.dtype)
    starts = cu_seqlens_q.tolist()
    for row, (first, end) in enumerate(pairwise(starts)):
        # What the real one does not look at, and reads or leaves out something else where it is not so.
        context, table = int(seqused_k[row]), int(kv_batch_idx[row])
        assert 0 <= end - first <= min(max_seqlen_q, context) and end <= total_q and 0 <= table < len(page_table)
        keys, values = (gather(cache.transpose(1, 2), page_table[table], context) for cache in (k, v))
        if end > first:
            out[first:end] = attend_row(
                q[first:end].float(), keys, values, softmax_scale, window=window or None, soft_cap=softcap
            )
    return out


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    assert causal and window_size[1] == (-1 if window_size[0] < 0 else 0)
    tensors = cu_seqlens_q, cache_seqlens, max_seqlen_q, page_table, cache_batch_idx
    return forward(q, k_cache, v_cache, *tensors, softmax_scale, window_size[0] + 1, softcap)


def module() -> ModuleType:
    """For the place of `flash_attn_interface` among the modules."""
    made = ModuleType("flash_attn_interface")
    made.flash_attn_with_kvcache = flash_attn_with_kvcache
    return made
