"""How a program ends: its status, a user's mistake in one sentence, what is printed. It imports nothing heavy."""

import codecs
import io
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, cast

from ldm.checks import shorten_values

STEERING = re.compile(r"(?!\A)\r|[^\t\n\r -~\xa0-\u2029\u202f-\u2065\u206a-\U0010ffff]")  # bidirectional marks, too
BAR = re.compile(r"\n*(\x1b\[A)*")


def run(main: Callable[[], object], fast_exit: bool = False) -> NoReturn:
    """Run a script's `main()` and end the process: status 0, 2 with one sentence for a user's mistake, 130 for Ctrl-C
    or SIGTERM, by which schedulers and containers end a program.

    Users' mistakes are ValueError and OSError, and too little memory; anything else is a bug and keeps its traceback.
    `LDM_TRACEBACK=1` shows it for all. A KeyboardInterrupt may carry a sentence of its own (how to go on). Where nobody
    reads the output any more (`| head -0`) the status is 141, as of other programs. `fast_exit` leaves out the
    interpreter's teardown (0.7 s of CPU time after `import torch`); only for scripts that have closed what they opened.
    """
    status = 0
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the process was started without it, which bars of progress do not expect
            setattr(sys, name, open(os.devnull, "w"))
    others = warnings.showwarning

    def show(message: Any, category: Any, filename: str, *where: Any, **more: Any) -> None:
        """Print a warning of this package as a note, without the line of code that it came from."""
        if Path(__file__).parent in Path(filename).parents:
            print(f"note: {message}", file=sys.stderr)
        else:
            others(message, category, filename, *where, **more)

    warnings.showwarning = cast(Any, show)
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a KeyboardInterrupt
    codecs.register_error("ldm", _as_bytes_or_escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ldm")
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(Any, map(Printable, streams))
    try:
        main()
        print(end="", flush=True)
    except BrokenPipeError:
        status = 141
    except (ValueError, OSError) as error:
        status = _report(f"error: {sentence(error)}", 2)
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        said = f" ({str(error).splitlines()[0]})" if str(error) else ""
        status = _report(f"error: there is not enough memory{said}: smaller images or batches need less", 2)
    except KeyboardInterrupt as error:
        status = _report(str(error) or "interrupted: what was finished is saved", 130)
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            raise
        status = error.code or 0
    finally:
        signal.signal(signal.SIGTERM, terminate)
        sys.stdout, sys.stderr = streams
    if not _flush() or fast_exit:  # the interpreter would fail to flush too, and change the status
        os._exit(status)
    sys.exit(status)


class Printable:
    """A text stream in which what steers a terminal is escaped, as `\\x1b`, since names of files may hold it: all but
    lines, tabs, and the returns and the step upwards of bars of progress."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text."""
        return self.stream.write(text if BAR.fullmatch(text) else STEERING.sub(lambda m: ascii(m[0])[1:-1], text))


def _as_bytes_or_escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode what the output's encoding lacks: bytes of file names as they are, letters as `\\xf6`."""
    assert isinstance(error, UnicodeEncodeError)
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def _flush() -> bool:
    """Flush what was printed; return whether somebody could read it."""
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except OSError:
        return False
    return True


def _lacks_memory(error: Exception) -> bool:
    """Return whether it is Python's, or torch's (on a GPU, on a CPU), error for too little memory."""
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "you tried to allocate" in str(error)


def sentence(error: BaseException) -> str:
    """An exception in words for a user: `out/x: Permission denied`, not `[Errno 13] Permission denied: 'out/x'`."""
    if isinstance(error, OSError) and error.strerror is not None and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _report(message: str, status: int) -> int:
    if os.environ.get("LDM_TRACEBACK") == "1":
        traceback.print_exc()
    with suppress(BrokenPipeError):
        _flush()  # what was printed before comes first, in a file of both too
        print(shorten_values(message), file=sys.stderr)
    return status
