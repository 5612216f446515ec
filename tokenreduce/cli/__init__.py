"""The command line: it reads arguments, calls the library and prints; nothing is computed here.

Each module without an underscore is a command, and holds the function NAME_command; `_output`, `_media` and their
like are shared by commands. A command imports what it needs inside its function, so that `--help` is quick. Every
TokenReduceError ends a command with one line on stderr and exit code 2; docs/commands.md lists the exit codes. Nothing
else in the library imports this package.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import sys
import warnings
from typing import Annotated, Any

import typer
import typer.main

from tokenreduce import __version__
from tokenreduce.cli._terminal import guarded
from tokenreduce.cli._voice import Said, log_level, voice
from tokenreduce.errors import TokenReduceError, plain

FIRST = ("run", "compare", "plan", "validate")
"""Commands that head the list in `--help`; the others follow in alphabetical order."""

HELP = """Reduce the vision tokens of video language models, and see what it costs and saves.

\b
Examples:
  tokenreduce run demo --pipeline framefusion --budget 0.3
  tokenreduce plan framefusion --model llava-video-7b --frames 64
  tokenreduce presets
  tokenreduce validate my_pipeline.yaml
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for an error the user can mend, 130 for an interrupt.

    1 where the reader of our output has gone, or where an error is a bug of ours.
    """
    return guarded(_main, arguments)


def _main(arguments: list[str]) -> int:
    voice.quiet = False
    log, handler = logging.getLogger("tokenreduce"), Said()
    level = log.level
    log.addHandler(handler)
    log.setLevel(log_level(quiet=False, verbose=False))
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = _commands()(args=arguments, prog_name="tokenreduce", standalone_mode=False)
            return _finish(code if isinstance(code, int) else 0)
        except typer.TyperException as error:
            return _fail(error.format_message())
        except TokenReduceError as error:
            return _fail(str(error))
        except (KeyboardInterrupt, typer.Abort):
            return _finish(130)
        finally:
            log.removeHandler(handler)
            log.setLevel(level)


def application() -> typer.Typer:
    """The typer application with all commands."""
    app = typer.Typer(
        help=HELP,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback(invoke_without_command=True)(_top)
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    for name in sorted(names, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name)):
        module = importlib.import_module(f"{__name__}.{name}")
        app.command(name)(getattr(module, f"{name}_command"))
    return app


def _commands() -> Any:
    """The application as it runs: each command takes --quiet and --verbose."""
    flags = typer.Typer(add_completion=False)
    flags.command()(_flags)
    shared = typer.main.get_command(flags).params
    group: Any = typer.main.get_command(application())
    for command in group.commands.values():
        command.params += shared
    return group


def _quiet(wanted: bool) -> None:
    if wanted:
        voice.quiet = True
        logging.getLogger("tokenreduce").setLevel(log_level(quiet=True, verbose=False))


def _verbose(wanted: bool) -> None:
    if wanted:
        logging.getLogger("tokenreduce").setLevel(log_level(quiet=False, verbose=True))


def _flags(
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", callback=_quiet, expose_value=False, help="Results and errors alone: no warnings, no progress."
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", callback=_verbose, expose_value=False, help="Also what the library logs."),
    ] = False,
) -> None:
    """The options of every command."""


def _top(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"tokenreduce {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _finish(code: int) -> int:
    if code == 130:
        print("interrupted", file=sys.stderr)
    return code


def _fail(message: str) -> int:
    voice.say(f"error: {plain(message)}")
    return 2


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if not voice.quiet:
        voice.say(f"warning: {plain(message)}")
