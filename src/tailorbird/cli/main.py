"""The program `tailorbird`: its commands, and what becomes of an error.

Exit status 0: done. 1: a failure of ours, or a quality gate that refused. 2: a mistake in what was given.
130: interrupted, with resumable work left behind.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.text import Text

import tailorbird
from tailorbird.cli import (
    adapters,
    batch,
    compare,
    compress,
    draft,
    evaluate,
    export,
    fit,
    formats,
    generate,
    methods,
    probe,
    serve,
    speed,
    tune,
)
from tailorbird.cli.output import err
from tailorbird.errors import TailorbirdError

ISSUES = "the project's issue tracker"
INTERRUPTED = 130
_RESUMABLE = ("fit", "compress", "compare", "tune", "draft", "batch", "adapters merge")

app = typer.Typer(
    name="tailorbird",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: tailorbird fit demo --memory 30% -o out/demo",
)
app.command(epilog=probe.EXAMPLE)(probe.probe)
app.command(epilog=fit.EXAMPLE)(fit.fit)
app.command(epilog=compress.EXAMPLE)(compress.compress)
app.command(epilog=compare.EXAMPLE)(compare.compare)
app.command(epilog=evaluate.EXAMPLE)(evaluate.evaluate)
app.command(epilog=speed.EXAMPLE)(speed.speed)
app.command(epilog=generate.EXAMPLE)(generate.generate)
app.command(epilog=tune.EXAMPLE)(tune.tune)
app.command(epilog=serve.EXAMPLE)(serve.serve)
app.add_typer(adapters.app)
app.command(epilog=batch.EXAMPLE)(batch.batch)
app.command(epilog=draft.EXAMPLE)(draft.draft)
app.command(epilog=export.EXAMPLE)(export.export)
app.command(epilog=methods.EXAMPLE)(methods.methods)
app.command(epilog=formats.EXAMPLE)(formats.formats)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tailorbird {tailorbird.__version__}")
        raise typer.Exit()


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Make a neural network that somebody else trained fit a memory budget, and prove what it cost."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line, print what went wrong if anything did, and return the exit status.

    Parameters
    ----------
    arguments : sequence of str
        Without the program's name.
    """
    # transformers warns of texts longer than the context, which are cut into windows here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        status = _parse_and_do(arguments)
        sys.stdout.flush()
    except TailorbirdError as error:
        _print_error(error)
        status = error.exit_status
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has left; nobody is there to be told.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        status = 1
    except Exception as error:
        _print_failure(error)
        status = 1
    if status == INTERRUPTED:
        resumable = " ".join(a for a in arguments if not a.startswith("-")).startswith(_RESUMABLE)
        again = "; the same command resumes where it stopped" if resumable else ""
        err().print(Text(f"interrupted{again}", style="yellow"))
    return status


def _parse_and_do(arguments: Sequence[str]) -> int:
    """Let typer parse, print usage errors and call the command; its exit status."""
    try:
        app(list(arguments))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def _print_error(error: TailorbirdError) -> None:
    """What was given, what was expected, what to do; with the traceback only where it was asked for."""
    if os.environ.get("TAILORBIRD_DEBUG") == "1":
        traceback.print_exception(error)
    message = Text("error: ", style="bold red")
    message.append(error.given, style="red")
    message.append(f"\nexpected: {error.expected}", style="red")
    message.append(f"\nwhat to do: {error.remedy}", style="red")
    err().print(message, soft_wrap=True)


def _print_failure(error: Exception) -> None:
    """An error nobody foresaw: short, with how to report it."""
    if os.environ.get("TAILORBIRD_DEBUG") == "1":
        traceback.print_exception(error)
    message = Text("internal error: ", style="bold red")
    message.append(f"{type(error).__name__}: {error}", style="red")
    message.append(
        f"\nThis is a fault of tailorbird {tailorbird.__version__}. Please report it to {ISSUES} with the "
        "traceback that the same command prints when TAILORBIRD_DEBUG=1 is set.",
        style="red",
    )
    err().print(message, soft_wrap=True)
