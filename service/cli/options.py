"""The flags of a generation, for the commands that ask for one; ranges and defaults are the server's."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import cast

from service.client.types import Options

FLAGS: tuple[tuple[str, Callable[[str], object], str, str], ...] = (
    ("--max-tokens", int, "N", "generate at most this many tokens; default: the model's, or what the context leaves"),
    ("--min-tokens", int, "N", "do not end before this many tokens"),
    ("--temperature", float, "T", "0 always takes the most likely token; default: the model's"),
    ("--top-k", int, "K", "draw from the k most likely tokens; 0 from all"),
    ("--top-p", float, "P", "draw from the most likely tokens that have this probability together"),
    ("--min-p", float, "P", "draw from tokens at least this many times as likely as the most likely"),
    ("--repetition-penalty", float, "X", "above 1 makes tokens of prompt and output less likely"),
    ("--presence-penalty", float, "X", "taken from the logit of every token in the output"),
    ("--frequency-penalty", float, "X", "the same, for each time it is there"),
    ("--seed", int, "N", "the same seed and prompt give the same tokens; default: drawn, and told by --json"),
    ("--priority", int, "N", "larger goes first among waiting requests"),
    ("--model", str, "NAME", "model to use; default: the only one"),
)
SWITCHES = (
    ("--ignore-eos", "go on past the model's end of text"),
    ("--include-stop-string", "leave the stop string in the text"),
    ("--keep-special-tokens", "show tokens such as <|im_end|>"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """One flag per option; options that are not given stay unset."""
    group = parser.add_argument_group("generation")
    for flag, kind, metavar, what in FLAGS:
        group.add_argument(flag, type=kind, metavar=metavar, help=what)
    group.add_argument("--stop", dest="stop_strings", action="append", metavar="TEXT", help="end here; repeatable")
    group.add_argument(
        "--stop-token-id", dest="stop_token_ids", action="append", type=int, metavar="ID", help="likewise, a token"
    )
    group.add_argument("--logit-bias", action="append", type=_bias, metavar="ID=X", help="add to a token's logit")
    for flag, what in SWITCHES:
        group.add_argument(flag, action="store_const", const=True, help=what)


def options_of(arguments: argparse.Namespace) -> Options:
    """The options that were given."""
    flags = [flag for flag, *_ in FLAGS] + [flag for flag, _ in SWITCHES]
    named = [flag[2:].replace("-", "_") for flag in flags]
    values = {name: getattr(arguments, name) for name in (*named, "stop_strings", "stop_token_ids")}
    values["logit_bias"] = dict(arguments.logit_bias) if arguments.logit_bias else None
    return cast(Options, values)


def _bias(text: str) -> tuple[int, float]:
    token_id, separator, bias = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError("write TOKEN_ID=BIAS")
    return int(token_id), float(bias)
