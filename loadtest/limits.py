"""What the machine can do at most, as the other side of every speed: bytes read and operations done per second.

    python -m loadtest.limits [--threads 1 2]

Compiles limits.c for this machine. Memory and the last level of the cache are read in large and small pieces;
operations are those of the dot-product instructions, of tile registers where there are some, on registers alone, which
no kernel can exceed. Each figure is the
best of several tries: others on the machine only ever take away. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from loadtest.machine import cpu_times, describe, noise, others_share
from model.native.build import find_compiler

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-fopenmp")
MEASURES = {
    "memory_bytes_per_second": ("read", "1024"),
    "l3_bytes_per_second": ("read", "L3"),
    "bf16_flops": ("bf16",),
    "fp32_flops": ("fp32",),
    "int8_ops": ("int8",),
}
"""How each limit is asked of the compiled program, before the number of threads; L3 stands for half of that cache."""

L3_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")

Limits = dict[str, float | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.limits", description=(__doc__ or "").splitlines()[0])
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cpus}), help="default: %(default)s")
    given = parser.parse_args(arguments)
    if min(given.threads) < 1:
        parser.error("threads must be at least 1")
    before = cpu_times()
    found = {str(threads): limits for threads, limits in measure_all(given.threads).items()}
    others = others_share(before, cpu_times())
    for threads, limits in found.items():
        print(f"{threads} threads: {as_text(limits)}")
    if warning := noise(others):
        print(warning, file=sys.stderr)
    print(json.dumps({"bench": "limits", "machine": describe(), "others_share": round(others, 3), "threads": found}))
    return 0


def measure_all(threads: Sequence[int]) -> dict[int, Limits]:
    """The limits with each number of threads. Raises BuildError without a compiler, CalledProcessError if it fails."""
    with TemporaryDirectory() as folder:
        program = Path(folder) / "limits"
        subprocess.run([find_compiler(), *FLAGS, str(SOURCE), "-o", str(program)], check=True)
        return {count: measure(program, count) for count in threads}


def measure(program: Path, threads: int) -> Limits:
    """The limits with a number of threads; None for an instruction that the machine lacks."""
    size = l3_bytes()
    half = str(max(1, int((size or 0) / 2**21)))
    measures = {name: [half if word == "L3" else word for word in words] for name, words in MEASURES.items()}
    found = {name: run(program, *words, str(threads)) for name, words in measures.items()}
    return found | {"l3_bytes": size} | ({} if size else {"l3_bytes_per_second": None})


def l3_bytes() -> float | None:
    """Size of the last level of the cache; None where the system does not tell."""
    return 1024.0 * int(L3_SIZE.read_text().strip().removesuffix("K")) if L3_SIZE.exists() else None


def run(program: Path, *words: str) -> float | None:
    """One measurement."""
    # Bound to cores: two threads on one core would read as half a machine.
    environment = os.environ | {"OMP_PROC_BIND": "true"}
    done = subprocess.run([str(program), *words], check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout) if done.stdout.strip() else None


def as_text(limits: Limits) -> str:
    """One line for whoever reads; giga-units."""
    return ", ".join(f"{name} {'none' if value is None else f'{value / 1e9:.1f} G'}" for name, value in limits.items())


if __name__ == "__main__":
    sys.exit(main())
