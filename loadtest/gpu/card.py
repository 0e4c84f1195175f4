"""The card of this machine: what torch tells of it, and the device on which a part computes.

    python -m loadtest.gpu.card

prints one JSON document, or says in one line on standard error why there is none and exits with 1.
"""

from __future__ import annotations

import json
import platform
import sys
from typing import Any

L2_BYTES = 64 * 2**20
"""Taken for the size of a card's last cache where torch does not tell."""


class NoCard(Exception):
    """There is no card to use; the message says why, in one line."""


def describe() -> dict[str, Any]:
    """Hardware and versions, for the record. Raises NoCard."""
    try:
        import torch
    except ImportError as error:
        raise NoCard(f"torch cannot be imported: {error}") from None
    from model.backend import find_card_fault

    fault = find_card_fault()
    if fault is not None:
        raise NoCard(fault)
    properties = torch.cuda.get_device_properties(0)
    capability = properties.major, properties.minor
    return {
        "name": properties.name,
        "capability": f"{capability[0]}.{capability[1]}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", L2_BYTES),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    try:
        print(json.dumps(describe()))
    except NoCard as reason:
        sys.exit(str(reason))
