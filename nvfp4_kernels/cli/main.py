"""nvfp4: the commands, their flags, and errors in one line.

Nothing here imports torch; a command does when it runs, so that --help answers at once.
"""

import argparse
import difflib
import errno
import io
import os
import re
import sys
from importlib import import_module

from nvfp4_kernels import __version__

# Each is a module of this folder with HELP, EXAMPLE, add_arguments(parser) and run(arguments) -> exit status.
COMMANDS = ("demo", "train", "generate", "quantize", "eval", "plan", "info", "check", "tune", "bench")


class UsageError(Exception):
    """A wrong command line."""


class Parser(argparse.ArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def _check_value(self, action: argparse.Action, value) -> None:
        if action.choices is not None and value not in action.choices:
            near = nearest(value, action.choices)
            also = f"; {near}" if near.startswith("nearest") else ""
            raise argparse.ArgumentError(action, f"got {value!r}; allowed: {', '.join(action.choices)}{also}")

    def error(self, message: str):
        for kind, allowed in (("int", "a whole number"), ("float", "a number")):
            message = re.sub(rf"invalid {kind} value: (.*)", rf"got \1; allowed: {allowed}", message)
        raise UsageError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The whole parser, and that of each command."""
    parser = Parser(
        prog="nvfp4",
        description="Train and run hybrid Mamba-2 / attention / mixture-of-experts models in NVFP4.",
        epilog="NVFP4_BACKEND=reference (or native, ...) forces a backend; NVFP4_DEBUG=1 shows tracebacks.",
    )
    parser.add_argument("--version", action="version", version=f"nvfp4_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {}
    for name in COMMANDS:
        module = import_module(f"nvfp4_kernels.cli.{name}")
        parsers[name] = commands.add_parser(
            name, help=module.HELP, description=module.HELP, epilog=f"example:\n  {module.EXAMPLE}"
        )
        module.add_arguments(parsers[name])
    return parser, parsers


def parse(argv: list[str]) -> argparse.Namespace:
    parser, parsers = build_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise UsageError(f"unknown command {argv[0]}; {nearest(argv[0], COMMANDS)}")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = next((text for text in unknown if text.startswith("-")), unknown[0]).partition("=")[0]
        known = [option for option in parsers[arguments.command]._option_string_actions if option.startswith("--")]
        what = "unknown flag" if flag.startswith("-") else "unexpected argument"
        raise UsageError(f"{what} {flag} of nvfp4 {arguments.command}; {nearest(flag, known)}")
    return arguments


def nearest(wrong: str, known) -> str:
    near = difflib.get_close_matches(wrong, known, 1, 0.5)
    return f"nearest: {near[0]}" if near else f"allowed: {', '.join(known)}"


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0 done, 2 an error that was told in one line, 130 stopped by Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # a model may say what a terminal has no letter for, and a path may be no text
        sys.stdout.reconfigure(errors="replace")
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        return import_module(f"nvfp4_kernels.cli.{arguments.command}").run(arguments) or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nvfp4 info | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("NVFP4_DEBUG", "0") not in ("", "0"):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; do: free some space, then --resume (the checkpoints written so far are whole)"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} does not exist; do: check the path"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}; do: check the path and its permissions"
    if isinstance(error, MemoryError):
        return "out of memory; do: a smaller --batch or --length, or --checkpoint-activations"
    if isinstance(error, (UsageError, ValueError, TypeError, RuntimeError, ImportError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text}; do: run it again with NVFP4_DEBUG=1 and report the traceback"
