"""What a server prints when it is ready: what it serves, where, and commands to try it that work when pasted."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from model.interface import ModelFacts, Quantization
from service.config import Settings, is_loopback
from service.engine.messages import Hello

WILDCARDS = ("0.0.0.0", "::", "[::]")


@dataclass(frozen=True, slots=True)
class Banner:
    """Facts and commands, as lines."""

    title: str
    facts: tuple[tuple[str, str], ...]
    commands: tuple[str, ...]

    def show(self, stream: TextIO) -> None:
        """A panel on a terminal, plain lines elsewhere."""
        if stream.isatty():
            self._show_panel(stream)
        else:
            lines = [self.title, *(f"  {name:<10} {value}" for name, value in self.facts)]
            lines += ["Try it from another terminal:", *(f"  {command}" for command in self.commands)]
            stream.write("\n".join(lines) + "\n")
            stream.flush()

    def _show_panel(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        for name, value in self.facts:
            grid.add_row(Text(name, style="dim"), Text(value))
        console = Console(file=stream)
        console.print(Panel(grid, title=Text(self.title, style="bold"), title_align="left", expand=False))
        # Outside of the panel and never wrapped by us: a command must survive being copied.
        console.print("Try it from another terminal:", style="dim")
        for command in self.commands:
            console.print(Text(f"  {command}"), soft_wrap=True)


def make(settings: Settings, hello: Hello, *, address: str, metrics_address: str, has_chat: bool) -> Banner:
    """The banner of a server that listens on `address` (host:port)."""
    facts, shape = hello.facts, hello.shape
    pool_bytes = shape.num_blocks * shape.block_size * facts.kv_bytes_per_token
    pool_tokens = shape.num_blocks * shape.block_size
    rows = (
        ("model", f"{settings.served_name}: {facts.architecture}, {_count(facts.num_parameters)} parameters"),
        ("precision", f"{_precision(facts)}, weights {_bytes(facts.weight_bytes)}"),
        ("backend", _backend(facts)),
        ("context", f"{shape.context_length:,} tokens"),
        (
            "KV pool",
            f"{_bytes(pool_bytes)}: {pool_tokens:,} tokens in {shape.num_blocks:,} blocks of {shape.block_size}",
        ),
        ("gRPC", address),
        ("metrics", f"http://{metrics_address}/metrics"),
    )
    return Banner("Quire is serving", rows, _commands(settings, address, has_chat))


def _commands(settings: Settings, address: str, has_chat: bool) -> tuple[str, ...]:
    host, _, port = address.rpartition(":")
    if host in WILDCARDS:
        host = "127.0.0.1"
    is_default = is_loopback(host) and int(port) == Settings.model_fields["port"].default
    where = "" if is_default else f" --address {host}:{port}"
    quire = _executable()
    commands = [f"{quire} generate{where} {shlex.quote('def binary_search(')}"]
    if has_chat:
        commands.append(f"{quire} chat{where}")
    return tuple(commands)


def _executable() -> str:
    """How to call the command line from this directory."""
    python = Path(sys.executable)
    script = python.parent / "quire"
    if script.exists():
        return shlex.quote(_nearest(script))
    return f"{shlex.quote(_nearest(python))} -m service"


def _nearest(path: Path) -> str:
    """Relative to the current directory where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _backend(facts: ModelFacts) -> str:
    """What computes: a card by its name, or threads of a CPU."""
    if facts.card:
        return ", ".join(filter(None, (facts.backend, facts.card, facts.attention)))
    computing = f"{facts.backend} {facts.cpu_level}".strip()
    return f"{computing}, {facts.num_threads} threads" + (", tied to CPUs" if facts.has_tied_threads else "")


def _precision(facts: ModelFacts) -> str:
    """Of activations and cache, and of the weights where those are kept otherwise."""
    return facts.dtype if facts.quantization == Quantization.NONE else f"{facts.quantization} in {facts.dtype}"


def _count(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number} B"
