"""Compiles the C kernels: `python -m model.native.build`, at install or image build; nothing is compiled at run time.

Each source becomes one plain shared library per instruction set level, without torch's or Python's headers: all it
needs is a C compiler (GCC 9, clang 12, or later) and some seconds. A library whose sources have not changed is left
alone. A level that the compiler does not know is skipped; without OpenMP the kernels run on one thread.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from model.native.levels import COMMON_FLAGS, LIBRARY_DIR, SOURCE_DIR, Level, buildable_levels, library_path
from model.native.levels import source_digest as digest_of

COMPILERS = ("cc", "gcc", "clang")


class BuildError(Exception):
    """The kernels cannot be built here; the message is one line for the person who called."""


def find_compiler(names: tuple[str, ...] = COMPILERS) -> str:
    """The first compiler of these names on the path. Raises BuildError when there is none."""
    for name in names:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C compiler found (looked for {', '.join(names)}): install one, such as the package gcc")


def is_current(source: str, level: Level) -> bool:
    """Whether the level's library exists and was built from the sources as they are."""
    path = library_path(source, level)
    return path.exists() and digest_of(source, level).encode() in path.read_bytes()


def build_library(compiler: str, source: str, level: Level) -> str | None:
    """Builds one library, with OpenMP if the compiler has it. Returns None, or the compiler's complaint."""
    LIBRARY_DIR.mkdir(exist_ok=True)
    target = library_path(source, level)
    unfinished = target.with_suffix(".tmp")
    definition = f'-DQUIRE_SOURCE_DIGEST="{digest_of(source, level)}"'
    complaint = None
    for openmp in (["-fopenmp"], ["-Wno-unknown-pragmas"]):
        command = [compiler, *COMMON_FLAGS, *level.flags, *openmp, definition, str(SOURCE_DIR / f"{source}.c")]
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            unfinished.replace(target)
            return None
        complaint = done.stderr.strip()
    return complaint


def build(compiler_names: tuple[str, ...] = COMPILERS) -> list[Path]:
    """Brings all libraries up to date and returns the ones that were compiled.

    Raises BuildError when no compiler is found, or it cannot build the level that every machine runs.
    """
    built = []
    for source in sorted(path.stem for path in SOURCE_DIR.glob("*.c")):
        for level in buildable_levels():
            if is_current(source, level):
                continue
            complaint = build_library(find_compiler(compiler_names), source, level)
            if complaint is None:
                built.append(library_path(source, level))
            elif not level.is_x86:
                raise BuildError(f"cannot compile {source}.c: {complaint}")
    return built


def main() -> int:
    """Runs the command line; 1 with one line on standard error when the kernels cannot be built."""
    parser = argparse.ArgumentParser(prog="python -m model.native.build", description="Compiles the C kernels.")
    parser.add_argument("--cc", help="the C compiler to use (default: the first of cc, gcc, clang)")
    arguments = parser.parse_args()
    try:
        built = build((arguments.cc,) if arguments.cc else COMPILERS)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"built {path.name}" for path in built) or "native kernels are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
