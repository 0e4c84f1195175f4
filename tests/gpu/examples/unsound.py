"""Variants each of which the check of compiled kernels must fail, for a reason of its own."""

import os

from model.gpu.variant import Variant
from tests.gpu.examples.sound import PRODUCT, ROW, lower_by_peak, product


class Fatal:
    """Ends the process that looks at it, as a crash in a compiler does."""

    @property
    def arg_names(self) -> list[str]:
        os._exit(3)


def variants() -> list[Variant]:
    without_a_type = {name: kind for name, kind in PRODUCT.items() if name != "c_ptr"}
    return [
        Variant("crash", Fatal(), {}, {}),
        Variant("more values than registers", lower_by_peak, ROW, {"WIDTH": 16384}, num_warps=1, aligned=tuple(ROW)),
        Variant("too few rows for a warp group", product, PRODUCT, {"M": 16}, uses_wgmma=True),
        Variant("no power of two", product, PRODUCT, {"M": 24}),
        Variant("argument without a type", product, without_a_type, {"M": 64}),
        Variant("aligned constant", product, PRODUCT, {"M": 64}, aligned=("M",)),
    ]
