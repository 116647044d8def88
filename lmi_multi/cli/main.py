"""The entry point: runs a command and turns whatever happens into one line and an exit code.

Exit codes: 0 done, 1 failure, 2 bad usage, 130 interrupted, 141 the reader of our output left.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence

DONE, FAILURE, USAGE, INTERRUPTED, PIPE_CLOSED, TERMINATED = 0, 1, 2, 130, 141, 143


def main() -> None:
    """Run the command of `sys.argv` and leave with its exit code."""
    if os.getpid() == 1:
        # The kernel keeps SIGTERM from a container's first process until there is a handler.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    code = run(sys.argv[1:])
    # Where Ctrl-C struck in text that was executed, as dataclasses do when they are imported,
    # `python -m` ends by the signal, whatever the code. Executing more text makes it forget.
    exec("")  # noqa: S102
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Run one command line; returns its exit code. Errors are one line on standard error."""
    args, debug = take_debug(argv)
    try:
        # Imported here so that Ctrl-C during the imports ends like any other.
        from lmi_multi.cli.app import invoke

        code = invoke(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as end:
        # Rich answers a broken pipe with SystemExit.
        if isinstance(end, SystemExit) and not isinstance(end.__context__, BrokenPipeError):
            raise
        _silence_stdout()
        return PIPE_CLOSED
    except Exception as error:
        return report(error, debug=debug)


def take_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of a command line, wherever it stands before a `--`."""
    args = list(argv)
    end = args.index("--") if "--" in args else len(args)
    head = [arg for arg in args[:end] if arg != "--debug"]
    return head + args[end:], len(head) < end


def report(error: Exception, *, debug: bool) -> int:
    """Print `error` as one line, after its traceback with `debug`; returns the exit code."""
    from lmi_multi.errors import LmiError, OptionError, first_line

    if debug:
        traceback.print_exception(error)
    code = USAGE if isinstance(error, OptionError) else FAILURE
    message = first_line(error)
    if _is_usage_error(error):
        code, message = USAGE, _usage_message(error)
    elif not isinstance(error, LmiError | OSError):
        # Not raised on purpose: say so, and how to see where.
        message = f"{type(error).__name__}: {message} (--debug shows where)"
    print(f"error: {message}", file=sys.stderr)
    return code


def _is_usage_error(error: Exception) -> bool:
    # By shape, not class: newer typer carries its own copy of click, older ones import click.
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _usage_message(error: Exception) -> str:
    message = " ".join(str(error.format_message()).split())  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "lmi-multi")
    return f"{message} (see '{path} --help')"


def _silence_stdout() -> None:
    """Point standard output at nothing, so that the interpreter's last flush stays quiet."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)
