"""Programs of tests in processes of their own, forked from one that has imported torch: which takes a second."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory


class WarmPython:
    """`warm_python(code, *arguments)` is `python -c code arguments` in a new process, with torch imported and no more.

    Not for tests of how Python starts or ends, or of what a process imports before torch.
    """

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # this tree, installed or not
        command = [sys.executable, __file__]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def __call__(
        self, code: str, *arguments: object, cwd: str | Path = ".", meanwhile: Callable[[], object] = lambda: None
    ) -> subprocess.CompletedProcess:
        """Run the code, and `meanwhile` while it runs; return its status and what it printed."""
        argv = ["-c", *map(str, arguments)]
        with TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdout", "stderr")]
            request = {"code": code, "argv": argv, "cwd": str(Path(cwd).absolute()), "files": list(map(str, files))}
            print(json.dumps(request | {"environment": dict(os.environ)}), file=self.process.stdin, flush=True)
            try:
                meanwhile()
            finally:
                status = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(argv, status, *(file.read_text() for file in files))

    def close(self) -> None:
        """End the process that the others are forked from."""
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Fork a process for each line of the standard input, and print its status."""
    import torch  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(code: str, argv: list[str], cwd: str, files: list[str], environment: dict[str, str]) -> int:
    """Run the code as `python -c` does, and return the status of the process."""
    for number, path in enumerate((os.devnull, *files)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = argv, ""
    status: object = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


if __name__ == "__main__":
    serve()
