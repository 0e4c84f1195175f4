"""What a machine tells of its NVIDIA cards without torch: their names, and what is missing for them to compute.

Standard library only. What only torch can tell, such as a card's compute capability, model/backend.py asks.
"""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

CARDS = Path("/proc/driver/nvidia/gpus")
C_COMPILERS = ("gcc", "clang")
"""With one of them, triton builds what loads kernels when the first is launched."""
OTHER_BUILDS = ("cpu", "rocm", "xpu")
"""How the local part of torch's version begins where it was not built for NVIDIA cards."""


def cards(driver: Path = CARDS) -> list[str]:
    """The names of the NVIDIA cards that the driver shows, whether or not torch can use them."""
    told = (file.read_text(errors="replace").splitlines() for file in sorted(driver.glob("*/information")))
    return [line.partition(":")[2].strip() for lines in told for line in lines if line.startswith("Model:")]


def find_install_fault() -> str | None:
    """Why what is installed cannot use a card, in a few words; None where nothing speaks against it."""
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        return "torch is not installed"
    if torch_version.partition("+")[2].startswith(OTHER_BUILDS):
        return f"torch {torch_version} is not built for NVIDIA cards"
    return find_triton_fault()


def find_triton_fault() -> str | None:
    """Why kernels for a card cannot be compiled here, in a few words; None where they can."""
    if find_spec("triton") is None:
        return "triton, which compiles the kernels for a card, is not installed"
    if not any(map(shutil.which, C_COMPILERS)):
        return f"triton needs a C compiler, and there is none of {', '.join(C_COMPILERS)}"
    return None
