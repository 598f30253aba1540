"""``penstock``: finds the command, runs it, and ends with the exit code that its outcome has.

What a command raises on purpose (:class:`~schemas.errors.PenstockError`) is told in one line a fault on stderr, without a
traceback; ``PENSTOCK_DEBUG=1`` shows the traceback too. Exit codes are those of :mod:`schemas.errors`; 2 also stands for a
wrong command line, 130 for Ctrl-C. Help is plain text: a command is not made to wait for a renderer.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from nodes.cli._late import late
from nodes.cli._version import VERSION
from nodes.cli.commands import COMMANDS
from schemas.errors import ConfigError, PenstockError, did_you_mean

if TYPE_CHECKING:
    from typer.core import TyperCommand

INTERRUPTED = 130


class Commands(TyperGroup):
    """The commands of :data:`COMMANDS`, each imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        if cmd_name not in COMMANDS:
            if ctx.resilient_parsing:  # a shell asks for completions
                return None
            raise ConfigError(f"there is no command {cmd_name!r}{did_you_mean(cmd_name, COMMANDS)}")
        module, text = COMMANDS[cmd_name]
        one = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        function = import_module(module).command
        one.command(cmd_name, short_help=text, no_args_is_help=False)(function)
        command: TyperCommand = typer.main.get_command(one)  # type: ignore[assignment] # one command: no group is made
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The help's list, from the table: no command is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"penstock {VERSION}")
        raise typer.Exit


@app.callback()
def _penstock(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Penstock: small nodes that sense, preprocess, infer, aggregate and uplink, wired in one YAML file over MQTT."""
    del version


def lines_of(error: PenstockError) -> list[str]:
    """What to tell of an error, one line for each fault; a ``TopologyError`` has its own, with their places."""
    if isinstance(error, ConfigError) and not getattr(error, "lines", ()):
        return [": ".join(filter(None, (".".join(map(str, p.path)), p.message))) for p in error.problems]
    return str(error).splitlines() or [type(error).__name__]


def run(args: Sequence[str]) -> int:
    """Runs the command line ``args`` (without the program's name) and gives its exit code."""
    debug = os.environ.get("PENSTOCK_DEBUG", "") not in {"", "0"}
    try:
        code = app(list(args) or ["--help"], prog_name="penstock", standalone_mode=False)
    except PenstockError as error:
        for line in lines_of(error):
            print(f"error: {line}", file=sys.stderr)
        if debug:
            raise
        return error.exit_code
    except typer.TyperException as error:  # a wrong option or argument
        print(f"error: {error.format_message()}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        print(f"error: a fault in Penstock: {type(error).__name__}: {error}", file=sys.stderr)
        print("error: PENSTOCK_DEBUG=1 shows where; please report it", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry of the ``penstock`` command."""
    late("numpy")
    gc.set_threshold(50_000, 20, 20)  # imports make much that stays: looking through it again and again takes 50 ms
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: a command line needs no pool of threads
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
