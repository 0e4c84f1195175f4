"""The instruction set levels that the kernels are compiled for, and which of them this machine can run.

Every library is named by its level, and carries a digest of everything it was built from, so that a stale one is
recognised. Standard library only; it does not know what the kernels compute.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

SOURCE_DIR = Path(__file__).parent
SOURCE = SOURCE_DIR / "kernels.c"
LIBRARY_DIR = SOURCE_DIR / "lib"
X86_MACHINES = ("x86_64", "AMD64")
COMMON_FLAGS = (
    *("-std=c11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # Whether a multiply-add is fused is written in the source: the bits must not depend on the optimiser's mood.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread"),
)
V3_FEATURES = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
V4_FEATURES = V3_FEATURES | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
V4_FLAGS = ("-march=x86-64-v4", "-mprefer-vector-width=512")
BF16_FEATURES = V4_FEATURES | {"avx512_bf16", "avx512_vnni"}
BF16_FLAGS = ("-mavx512bf16", "-mavx512vnni")
AMX_FLAGS = ("-mamx-tile", "-mamx-bf16", "-mamx-int8")


@dataclass(frozen=True, slots=True)
class Level:
    """One set of compiler flags and the CPU features (names of /proc/cpuinfo) that its code needs."""

    name: str
    flags: tuple[str, ...]
    features: frozenset[str]

    @property
    def is_x86(self) -> bool:
        """Whether only an x86-64 machine can build and run it; a level without needs is for every machine."""
        return bool(self.features)


LEVELS = (
    Level("v4_amx", (*V4_FLAGS, *BF16_FLAGS, *AMX_FLAGS), BF16_FEATURES | {"amx_tile", "amx_bf16", "amx_int8"}),
    Level("v4_bf16", (*V4_FLAGS, *BF16_FLAGS), BF16_FEATURES),
    Level("v4_vnni", (*V4_FLAGS, "-mavx512vnni"), V4_FEATURES | {"avx512_vnni"}),
    Level("v4", V4_FLAGS, V4_FEATURES),
    Level("v3", ("-march=x86-64-v3",), V3_FEATURES),
    Level("baseline", (), frozenset()),
)
"""Fastest first."""


def buildable_levels() -> list[Level]:
    """The levels that a compiler on this kind of machine can aim at, fastest first."""
    return [level for level in LEVELS if not level.is_x86 or platform.machine() in X86_MACHINES]


def runnable_levels(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[Level]:
    """The levels that this machine's processor can execute, fastest first; only the baseline where it does not tell."""
    features = cpu_features(cpuinfo.read_text()) if cpuinfo.exists() else frozenset()
    return [level for level in buildable_levels() if level.features <= features]


def cpu_features(cpuinfo_text: str) -> frozenset[str]:
    """The features of the first processor in the text of /proc/cpuinfo."""
    for line in cpuinfo_text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def usable_levels() -> list[Level]:
    """The levels that were built here and that this machine can execute, fastest first."""
    return [level for level in runnable_levels() if library_path(level).exists()]


def library_path(level: Level) -> Path:
    """Where the library of a level lies once it is built."""
    return LIBRARY_DIR / f"quire_{level.name}.so"


def source_digest(level: Level) -> str:
    """Names everything that a library is made from: the C file, all headers, the flags."""
    digest = hashlib.sha256("\n".join([*COMMON_FLAGS, *level.flags]).encode())
    for path in [SOURCE, *sorted(SOURCE_DIR.glob("*.h"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
