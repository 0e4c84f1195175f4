"""Small kernels whose variants pass the check of compiled kernels. Those in unsound.py do not."""

import triton
import triton.language as tl

from model.gpu.variant import Variant

PRODUCT = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32"}
ROW = {"x_ptr": "*fp32", "y_ptr": "*fp32", "length": "i32"}


@triton.jit
def product(a_ptr, b_ptr, c_ptr, M: tl.constexpr):
    """c[M, 64] = a[M, 64] b[64, 64]"""
    rows = tl.arange(0, M)[:, None] * 64
    inner = tl.arange(0, 64)
    a = tl.load(a_ptr + rows + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * 64 + inner[None, :])
    tl.store(c_ptr + rows + inner[None, :], tl.dot(a, b))


@triton.jit
def lower_by_peak(x_ptr, y_ptr, length, WIDTH: tl.constexpr):
    """y = x - max(x). All of a row is in registers until its peak is known."""
    columns = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + columns, mask=columns < length, other=-float("inf"))
    tl.store(y_ptr + columns, x - tl.max(x), mask=columns < length)


def variants() -> list[Variant]:
    return [
        Variant("product of 64 rows", product, PRODUCT, {"M": 64}, uses_wgmma=True, aligned=tuple(PRODUCT)),
        Variant("product of 16 rows", product, PRODUCT, {"M": 16}, aligned=tuple(PRODUCT)),
        Variant("row of 1024", lower_by_peak, ROW, {"WIDTH": 1024}, num_warps=1, aligned=tuple(ROW)),
    ]
