"""What a card can do at most: bytes copied and operations of bfloat16 matrix products in a second, on random data.

    python -m loadtest.gpu.limits --records FILE

The copy counts bytes read and bytes written. The product is large enough to fill the card and runs hot, as prompts do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from loadtest.gpu.measure import measure, open_device, random_tensor, relative_error
from loadtest.gpu.records import PartOptions, Records, parse_part, read_records
from loadtest.roofline import MachineRates

COPY_NUMBERS = 2**30
PRODUCT_SIZE = 8192
DRY_COPY_NUMBERS = 2**16
DRY_PRODUCT_SIZE = 64
CHECKED_ROWS = 16
TOLERANCE = 0.01
"""Of a product in bfloat16 against one in float32."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes. Returns the exit code."""
    options = parse_part("limits", arguments)
    write_limits(options.records, options.is_dry)
    return 0


def rates_of(options: PartOptions) -> MachineRates:
    """The card's rates as this call's part found them, or measured now where it did not."""
    found = [record for record in read_records(options.records.file) if record["kind"] == "limits"]
    return MachineRates.of_card(found[-1] if found else write_limits(options.records, options.is_dry))


def write_limits(records: Records, is_dry: bool) -> dict[str, float]:
    """Measures the limits, writes and returns them. Raises ValueError where the product is wrong."""
    device = open_device(is_dry)
    limits = measure_memory(device, DRY_COPY_NUMBERS if is_dry else COPY_NUMBERS)
    limits |= measure_products(device, DRY_PRODUCT_SIZE if is_dry else PRODUCT_SIZE)
    records.write("limits", **limits)
    return limits


def measure_memory(device: torch.device, count: int) -> dict[str, float]:
    """Bytes a second: of a copy, read and written ones, and of reading alone."""
    source = random_tensor(count, device=device)
    target = torch.empty_like(source)
    num_bytes = source.numel() * source.element_size()
    copy = measure([lambda: target.copy_(source)], device)
    read = measure([lambda: torch.sum(source, dtype=torch.float32)], device)
    return {
        "bytes_per_second": 2 * num_bytes / copy.seconds,
        "read_bytes_per_second": num_bytes / read.seconds,
        "copy_noise": copy.noise,
    }


def measure_products(device: torch.device, size: int) -> dict[str, float]:
    """Operations a second of a square product in bfloat16. Raises ValueError where it is wrong."""
    a, b = (random_tensor(size, size, device=device) for _ in range(2))
    c = torch.empty_like(a)
    product = measure([lambda: torch.mm(a, b, out=c)], device)
    error = relative_error(c[:CHECKED_ROWS], a[:CHECKED_ROWS].float() @ b.float())
    if not error < TOLERANCE:
        raise ValueError(f"the product of two matrices is off by {error:.2g}")
    return {"bf16_flops": 2 * size**3 / product.seconds, "product_noise": product.noise}


if __name__ == "__main__":
    sys.exit(main())
