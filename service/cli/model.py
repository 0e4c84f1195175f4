"""Describe a model directory: its architecture, what it costs, and how many sequences fit a key/value budget."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from model.cards import cards
from model.info import ModelInfo, backend_here, cpu_levels, load_info
from model.interface import CPU_BLOCK_SIZE, CPU_KV_CACHE_BYTES, Dtype, Quantization
from service.cli.parser import positive_int
from service.config import BUILT_IN_MODEL, check_setting
from service.errors import StartupError

MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    info = parser.add_subparsers(dest="action", metavar="ACTION", required=True).add_parser(
        "info", prog="quire model info", help="describe a model directory", description=__doc__
    )
    info.add_argument("directory", nargs="?", type=Path, metavar="DIR", default=BUILT_IN_MODEL, help="[built-in model]")
    info.add_argument(
        "--kv-cache-mib", type=positive_int, metavar="N", default=CPU_KV_CACHE_BYTES // MIB, help="[%(default)s]"
    )
    info.add_argument("--block-size", type=positive_int, metavar="N", default=CPU_BLOCK_SIZE, help="[%(default)s]")
    info.add_argument("--context-length", type=positive_int, metavar="N", help="tokens per sequence [the model's own]")
    info.add_argument("--quantize", choices=list(Quantization), type=Quantization, default=Quantization.NONE)
    info.add_argument("--dtype", choices=list(Dtype), type=Dtype, help="[the checkpoint's own]")
    info.add_argument("--json", action="store_true", help="print one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    check_setting("block_size", arguments.block_size)
    try:
        info = load_info(arguments.directory)
    except ValueError as error:
        raise StartupError(str(error)) from None
    own = info.config.context_length
    if (arguments.context_length or 0) > own:
        raise StartupError(f"--context-length: the model's own is {own}")
    facts = _facts(info, arguments)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_tables(facts, arguments.directory)
    return 0


def _facts(info: ModelInfo, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything told, as plain values: the JSON document, and what the tables show."""
    config, dtype, quantization = info.config, arguments.dtype or info.config.dtype, arguments.quantize
    context_length = arguments.context_length or config.context_length
    budget, weight_bytes = arguments.kv_cache_mib * MIB, info.weight_bytes(dtype, quantization)
    return {
        "architecture": config.architecture,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "context_length": context_length,
        "dtype": str(dtype),
        "quantization": str(quantization),
        "backend": backend_here(config, dtype, quantization, arguments.block_size),
        "cards": cards(),
        "cpu_levels": cpu_levels(),
        "parameters": {str(kind): count for kind, count in info.parameters.items()},
        "num_parameters": info.num_parameters,
        "bytes": {str(kind): num_bytes for kind, num_bytes in weight_bytes.items()},
        "weight_bytes": sum(weight_bytes.values()),
        "file_bytes": info.file_bytes,
        "kv_bytes_per_token": config.kv_bytes_per_token(dtype),
        "kv_cache_bytes": budget,
        "block_size": arguments.block_size,
        "sequences_that_fit": {
            str(tokens): info.sequences_that_fit(budget, tokens, arguments.block_size, dtype)
            for tokens in _lengths(context_length)
        },
    }


def _lengths(context_length: int) -> list[int]:
    """Sequence lengths to plan with: the whole context, a quarter, a sixteenth."""
    return sorted({max(1, context_length // part) for part in (16, 4, 1)})


def _print_tables(facts: dict[str, Any], directory: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    shape = (
        f"{facts['num_layers']} layers of width {facts['hidden_size']:,}, {facts['num_heads']} heads of "
        f"{facts['head_dim']} ({facts['num_kv_heads']} key/value), MLP {facts['intermediate_size']:,}"
    )
    is_coded = facts["quantization"] != Quantization.NONE
    precision = f"{facts['quantization']} and {facts['dtype']}" if is_coded else facts["dtype"]
    # Some kernels keep bfloat16 in 12 bits, as far as its values allow.
    most = "at most " if precision == Dtype.BFLOAT16 else ""
    per_token = f"{_size(facts['kv_bytes_per_token'])} per token, blocks of {facts['block_size']}"
    rows = [
        ("directory", str(directory)),
        ("architecture", facts["architecture"]),
        ("shape", shape),
        ("vocabulary", f"{facts['vocab_size']:,} tokens"),
        ("context", f"{facts['context_length']:,} tokens"),
        ("weights", f"{most}{_size(facts['weight_bytes'])} in {precision}, {_size(facts['file_bytes'])} on disk"),
        ("backend here", facts["backend"]),
        ("keys and values", per_token),
    ]
    overview, matrices, fits = Table.grid(padding=(0, 2)), Table(box=None), Table(box=None)
    for name, value in rows:
        overview.add_row(name, value)
    for heading in ("parameters", "number", "bytes", "share"):
        matrices.add_column(heading, justify="left" if heading == "parameters" else "right")
    total = facts["num_parameters"]
    sizes = {**facts["bytes"], "all": facts["weight_bytes"]}
    for kind, count in {**facts["parameters"], "all": total}.items():
        matrices.add_row(kind, f"{count:,}", _size(sizes[kind]), f"{count / total:.1%}")
    fits.add_column("tokens per sequence", justify="right")
    fits.add_column(f"sequences in {_size(facts['kv_cache_bytes'])}", justify="right")
    for tokens, count in facts["sequences_that_fit"].items():
        fits.add_row(f"{int(tokens):,}", f"{count:,}")
    console = Console(highlight=False, markup=False)
    for table in (overview, matrices, fits):
        console.print(table)
        console.print()


def _size(num_bytes: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} B"
