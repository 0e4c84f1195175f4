"""The `quire` command: picks the subcommand, and turns every way to end into an exit code and at most one line.

Exit codes: 0 done, 1 the server failed or has no room, 2 a user's mistake, whether found here or by the server,
130 interrupted, 141 nobody reads the output.
It knows no command's flags, and imports only the command that runs: a container runs `quire health` every few seconds.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from service.cli.parser import CommandFailed, Parser
from service.errors import StartupError

COMMANDS = {
    "serve": "serve a model over gRPC",
    "generate": "generate text from a prompt, streamed from a running server",
    "chat": "talk with a running server's model",
    "model": "describe a model directory: what it costs and how many sequences fit",
    "health": "ask a running server for its health (exit code 0 or 1)",
}
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code. SystemExit passes through argparse's help and refusals."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given or given[0] not in COMMANDS:
        return _without_command(given)
    name = given[0]
    command = importlib.import_module(f"service.cli.{name}")
    parser = Parser(prog=f"quire {name}", description=command.__doc__)
    try:
        command.add_arguments(parser)
        code: int = command.run(parser.parse_args(given[1:]))
        sys.stdout.flush()
    except StartupError as error:
        return _fail(str(error), 2)
    except CommandFailed as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more at exit, which would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code


def _without_command(given: Sequence[str]) -> int:
    """Help, the version, or what is wrong."""
    parser = Parser(prog="quire", description="Serve a transformer language model over gRPC, and use it.")
    parser.add_argument("--version", action="version", help="show the version", version=f"quire {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what)
    if not given:  # on standard error and no success: a script that forgot the command must not go on
        parser.print_help(sys.stderr)
        return 2
    parser.parse_args(given)
    raise AssertionError("every command was handled before")


def _version() -> str:
    """The installed package's."""
    # Imported only here: a command has no use for it.
    from importlib import metadata

    try:
        return metadata.version("quire")
    except metadata.PackageNotFoundError:
        return "unknown (not installed as a package)"


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"quire: error: {' '.join(message.split())}", file=sys.stderr)
    return code
