"""The flags of a generation, for the commands that ask for one; ranges and defaults are the server's."""

from __future__ import annotations

import argparse
import re
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
OTHER_NAMES = {
    "stop_strings": "--stop",
    "stop_token_ids": "--stop-token-id",
    "logit_bias": "--logit-bias",
    "top_logprobs": "--top-logprobs",
    "text": "PROMPT",
    "prompt": "PROMPT",
}
"""How the user knows the options that have no flag of the same name."""
FIELD = re.compile(r"(?:spec\.)?(?:(?:sampling|stop|output)\.)?(\w+)(?=[\[:])")


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
    values = {name: getattr(arguments, name) for name in (*_same_names(), "stop_strings", "stop_token_ids")}
    values["logit_bias"] = dict(arguments.logit_bias) if arguments.logit_bias else None
    return cast(Options, values)


def named_by_flag(refusal: str) -> str:
    """A refusal of a field or option ("spec.sampling.top_p: must …"), with the flag's name where there is one."""
    found = FIELD.match(refusal)
    flag = found and (_same_names() | OTHER_NAMES).get(found[1])
    return f"{flag}{refusal[found.end() :]}" if found and flag else refusal


def _same_names() -> dict[str, str]:
    """Flags by the option of the same name."""
    flags = [flag for flag, *_ in FLAGS] + [flag for flag, _ in SWITCHES]
    return {flag[2:].replace("-", "_"): flag for flag in flags}


def _bias(text: str) -> tuple[int, float]:
    token_id, separator, bias = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError("write TOKEN_ID=BIAS")
    return int(token_id), float(bias)
