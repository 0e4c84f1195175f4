"""Compiles every kernel for a card that this machine need not have, and looks at what the compiler made of it.

    python -m model.gpu.check [MODULE ...]

Owns the list of modules that have kernels, and what their machine code must be like: no values in local memory, no more
shared memory than a block can have, and products of whole warp groups where a variant asks for them. Does not know what
a kernel computes: the tests in Triton's interpreter do. Neither a card nor a CUDA toolkit is needed: the assembler
(ptxas) and the reader of its output (cuobjdump) come in Triton's package. What has been compiled once, Triton keeps.

Prints a line a variant as they are done, then what failed, then one JSON document as the last line. Exits with 1 if a
variant failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.gpu.variant import Variant

MODULES = (
    "model.gpu.attention",
    "model.gpu.matmul",
    "model.gpu.operators",
    "model.gpu.penalties",
    "model.gpu.sampler",
    "model.gpu.slots",
)

TARGET = GPUTarget("cuda", 90, 32)
MAX_REGISTERS = 255
"""Of a thread, as far as an instruction can name them."""
MAX_SHARED_BYTES = 227 * 1024
"""Of a block, at compute capability 9.0."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a variant. Without faults it is as it should be. What could not be found out is None."""

    name: str
    faults: tuple[str, ...] = ()
    num_registers: int | None = None
    shared_bytes: int | None = None
    stack_bytes: int | None = None
    has_wgmma: bool | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        if self.seconds is None:
            return "FAILED"
        products = "wgmma" if self.has_wgmma else "no wgmma"
        return (
            f"{self.num_registers:3d} registers  {self.shared_bytes:6d} bytes shared  stack {self.stack_bytes}  "
            f"{products}  {self.seconds:.1f} s{'  FAILED' if self.faults else ''}"
        )


def gather(modules: Sequence[str]) -> list[Variant]:
    """The variants of some modules.

    Raises ModuleNotFoundError for a module that is not there, ValueError for one without variants and for a name that
    two variants have.
    """
    gathered: list[Variant] = []
    for module in modules:
        variants: list[Variant] = importlib.import_module(module).variants()
        if not variants:
            raise ValueError(f"{module} has no variants")
        gathered += variants
    twice = [name for name, count in Counter(variant.name for variant in gathered).items() if count > 1]
    if twice:
        raise ValueError(f"names of more than one variant: {', '.join(twice)}")
    return gathered


def source_of(variant: Variant) -> Any:
    """A variant as Triton's compiler takes it. Raises ValueError where it does not fit its kernel's arguments."""
    names = variant.kernel.arg_names
    if sorted([*variant.signature, *variant.constants]) != sorted(names):
        raise ValueError(
            f"{', '.join(names)} are the kernel's arguments; "
            f"{', '.join(variant.signature)} have types and {', '.join(variant.constants)} values"
        )
    if not variant.signature.keys() >= set(variant.aligned):
        raise ValueError(f"aligned names more than arguments that have types: {', '.join(variant.aligned)}")
    return ASTSource(
        fn=variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )


def resources_of(cubin: bytes) -> dict[str, int]:
    """What a kernel occupies, by cuobjdump's words for it: REG, STACK, LOCAL and others."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {word: int(number) for word, number in re.findall(r"\b([A-Z]+):(\d+)", told)}


def examine(variant: Variant) -> Verdict:
    """Compiles a variant. Whatever is wrong with it is in the verdict."""
    started = time.perf_counter()
    try:
        options = {
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "enable_fp_fusion": variant.has_fp_fusion,
        }
        compiled = triton.compile(source_of(variant), target=TARGET, options=options)
        resources = resources_of(compiled.asm["cubin"])
        num_registers, stack_bytes, local_bytes = resources["REG"], resources["STACK"], resources["LOCAL"]
    except Exception as error:
        return Verdict(variant.name, (f"{type(error).__name__}: {error}",))
    ptx, shared_bytes = compiled.asm["ptx"], compiled.metadata.shared
    has_wgmma = "wgmma.mma_async" in ptx
    judged = {
        f"more than {MAX_REGISTERS} registers": num_registers > MAX_REGISTERS,
        f"{stack_bytes} bytes of stack: values that found no register": stack_bytes > 0,
        "values in local memory": local_bytes > 0 or re.search(r"\b(ld|st)\.local\b", ptx) is not None,
        f"more than {MAX_SHARED_BYTES} bytes of shared memory": shared_bytes > MAX_SHARED_BYTES,
        "no wgmma": variant.uses_wgmma and not has_wgmma,
    }
    faults = tuple(fault for fault, is_so in judged.items() if is_so)
    seconds = round(time.perf_counter() - started, 2)
    return Verdict(variant.name, faults, num_registers, shared_bytes, stack_bytes, has_wgmma, seconds)


def examine_all(variants: Sequence[Variant]) -> Iterator[Verdict]:
    """Verdicts as they come, from as many processes as there are cores.

    Each variant has a process of its own: a compiler that crashes, as LLVM does where it meets what it holds
    impossible, fails that variant and no other. It is a fork, which has triton, torch and the kernels imported already.
    """
    fork = multiprocessing.get_context("fork")
    waiting = list(reversed(variants))
    running: dict[Connection, tuple[Variant, ForkProcess]] = {}
    while waiting or running:
        while waiting and len(running) < len(os.sched_getaffinity(0)):
            variant = waiting.pop()
            reader, writer = fork.Pipe(duplex=False)
            process = fork.Process(target=_send_verdict, args=(variant, writer))
            process.start()
            writer.close()  # the fork's is the only one left: its end is the end of the pipe
            running[reader] = variant, process
        for ready in wait(list(running)):
            assert isinstance(ready, Connection)
            variant, process = running.pop(ready)
            try:
                verdict: Verdict | None = ready.recv()
            except EOFError:
                verdict = None
            process.join()
            ready.close()
            yield verdict or Verdict(variant.name, (f"the compiler's process died: exit code {process.exitcode}",))


def _send_verdict(variant: Variant, writer: Connection) -> None:
    writer.send(examine(variant))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model.gpu.check", description="Compile the kernels for a card.")
    parser.add_argument("modules", metavar="MODULE", nargs="*", default=MODULES, help="only what these modules have")
    modules = parser.parse_args(arguments).modules
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the kernels would be interpreted, not compiled; unset it")
    started = time.perf_counter()
    variants = gather(modules)
    width = max(len(variant.name) for variant in variants)
    verdicts = []
    for verdict in examine_all(variants):
        verdicts.append(verdict)
        print(f"[{len(verdicts)}/{len(variants)}] {verdict.name:{width}s}  {verdict}", flush=True)
    failed = [verdict for verdict in verdicts if verdict.faults]
    for verdict in failed:
        print(f"FAILED {verdict.name}: {'; '.join(verdict.faults)}")
    document = {
        "target": f"sm_{TARGET.arch}",
        "triton": triton.__version__,
        "seconds": round(time.perf_counter() - started, 1),
        "failed": [verdict.name for verdict in failed],
        "variants": [asdict(verdict) for verdict in verdicts],
    }
    print(json.dumps(document))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
