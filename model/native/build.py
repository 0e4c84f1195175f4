"""Compiles the C kernels: `python -m model.native.build`, at install or image build; nothing is compiled at run time.

The C file becomes one plain shared library per instruction set level, without torch's or Python's headers: all it
needs is a C compiler (all levels: GCC 11, clang 12, or later) and a minute of two cores. A library whose sources have
not changed is left alone. A level that the compiler does not know is left out, and told on standard error.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from model.native.levels import (
    COMMON_FLAGS,
    LIBRARY_DIR,
    SOURCE,
    Level,
    buildable_levels,
    library_path,
    runnable_levels,
)
from model.native.levels import source_digest as digest_of
from model.threads import available_cpus

COMPILERS = ("cc", "gcc", "clang")


class BuildError(Exception):
    """The kernels cannot be built here; the message is one line for the person who called."""


class Outcome(NamedTuple):
    """What a build did: libraries that were compiled, and levels that were left out, with why."""

    built: list[Path]
    left_out: list[tuple[Level, str]]


def find_compiler(names: tuple[str, ...] = COMPILERS) -> str:
    """The first compiler of these names on the path. Raises BuildError when there is none."""
    for name in names:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C compiler found (looked for {', '.join(names)}): install one, such as the package gcc")


def is_current(level: Level) -> bool:
    """Whether the level's library exists and was built from the sources as they are."""
    path = library_path(level)
    return path.exists() and digest_of(level).encode() in path.read_bytes()


def build_library(compiler: str, level: Level) -> str | None:
    """Builds one library. Returns None, or the compiler's complaint."""
    LIBRARY_DIR.mkdir(exist_ok=True)
    target = library_path(level)
    unfinished = target.with_suffix(".tmp")
    definition = f'-DQUIRE_SOURCE_DIGEST="{digest_of(level)}"'
    command = [compiler, *COMMON_FLAGS, *level.flags, definition, str(SOURCE), "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip()
    unfinished.replace(target)
    return None


def is_unknown(compiler: str, level: Level, complaint: str) -> bool:
    """Whether a compiler complained because it does not take a level's flags, or its assembler the instructions."""
    if "Assembler messages" in complaint:
        return True
    command = [compiler, *level.flags, "-fsyntax-only", "-x", "c", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


def build(compiler_names: tuple[str, ...] = COMPILERS) -> Outcome:
    """Brings all libraries up to date, several at a time. Of a level that is left out no older library stays.

    Raises BuildError when no compiler is found, or it fails at the level that every machine runs,
    or at one that this machine runs and the compiler knows.
    """
    missing = [level for level in buildable_levels() if not is_current(level)]
    if not missing:
        return Outcome([], [])
    compiler = find_compiler(compiler_names)
    with ThreadPoolExecutor(available_cpus()) as pool:
        complaints = list(pool.map(lambda level: build_library(compiler, level), missing))
    outcome, runnable = Outcome([], []), runnable_levels()
    for level, complaint in zip(missing, complaints, strict=True):
        if complaint is None:
            outcome.built.append(library_path(level))
        elif not level.is_x86 or (level in runnable and not is_unknown(compiler, level, complaint)):
            raise BuildError(f"cannot compile {SOURCE.name}: {complaint}")
        else:
            # An old one would be refused as stale before one that can be opened were tried; another build's is kept.
            if not is_current(level):
                library_path(level).unlink(missing_ok=True)
            outcome.left_out.append((level, complaint))
    return outcome


def tell_left_out(left_out: list[tuple[Level, str]]) -> list[str]:
    """A line for each level: the first error of the compiler, and whether this machine would have run that level."""
    wanted = list(takewhile(lambda level: not is_current(level), runnable_levels()))
    lines = []
    for level, complaint in left_out:
        said = complaint.splitlines() or ["it does not say why"]
        why = next((line for line in said if "error" in line.lower()), said[0])
        cost = "warning: this machine's kernels will be slower: " if level in wanted else ""
        lines.append(f"{cost}this compiler cannot build level {level.name}: {why}")
    return lines


def main() -> int:
    """Runs the command line; 1 with one line on standard error when the kernels cannot be built."""
    parser = argparse.ArgumentParser(prog="python -m model.native.build", description="Compiles the C kernels.")
    parser.add_argument("--cc", help="the C compiler to use (default: the first of cc, gcc, clang)")
    arguments = parser.parse_args()
    try:
        built, left_out = build((arguments.cc,) if arguments.cc else COMPILERS)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in tell_left_out(left_out):
        print(line, file=sys.stderr)
    print("\n".join(f"built {path.name}" for path in built) or "native kernels are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
