"""Files that are complete or not there: links, devices, full disks, writers at the same time, and killed ones."""

import os
import re
import resource
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import refused
from folder_kills import replace_folder
from PIL import Image

from ldm.checkpoint.atomic import Lock, atomic, sweep, write_png, write_text
from ldm.checkpoint.atomic_folder import atomic_folder
from ldm.checkpoint.writing import save_file, save_torch
from ldm.inference.recipe import save_image


def write(path, text: str = "new", **options) -> None:
    with atomic(path, **options) as temporary:
        temporary.write_text(text)


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WRITERS = {
    "atomic": write,
    "safetensors": lambda path: save_file(path, {"a": torch.ones(9)}),
    "torch": lambda path: save_torch(path, {"a": torch.ones(9)}),
    "png": lambda path: save_image(Image.new("L", (8, 8)), path, "text"),
}


PLAIN = re.compile(r"\bopen\(.*[\"'][wax]b?[\"']|\.write_(?:text|bytes)\(|(?<!ldm)\.save\(")
# File -> lines that write without `atomic` in them, and why.
ELSEWHERE = {
    "checkpoint/atomic.py": 3,  # itself
    "checkpoint/diffusers_text_writer.py": 2,  # in a temporary folder
    "checkpoint/diffusers_writer.py": 1,  # in a temporary folder
    "commands/page.py": 3,  # in a temporary folder
    "inference/serve.py": 1,  # in memory
    "onnx/export.py": 3,  # in a temporary folder
    "program.py": 1,  # the null device
    "compvis/degradation.py": 1,  # in memory
    "evaluation/quality.py": 1,  # in a temporary folder
    "inference/xy_grid.py": 1,  # an example in its docstring
    "training/plan.py": 1,  # only counted
    "training/run_folder.py": 1,  # a line more in metrics.jsonl, which is cut on resuming
}


def test_nothing_is_written_in_another_way():
    root, found = Path(__file__).parent.parent / "ldm", {}
    for path in sorted(root.rglob("*.py")):
        lines = [line for line in path.read_text().splitlines() if PLAIN.search(line) and "temporary" not in line]
        if lines:
            found[path.relative_to(root).as_posix()] = len(lines)
    assert found == ELSEWHERE


def test_texts_and_images(tmp_path):
    write_text(tmp_path / "new" / "a", "ä")
    write_png(tmp_path / "b.jpg", Image.new("L", (8, 8)))
    assert (tmp_path / "new" / "a").read_bytes() == "ä".encode() and Image.open(tmp_path / "b.jpg").format == "PNG"
    write_text(Path(os.devnull), "a")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    refused("new' is a folder", write_text, tmp_path / "new", "a", error=OSError)


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
def test_failing_at_the_very_end_leaves_no_temporary(tmp_path, monkeypatch, call):
    path = tmp_path / "a"
    path.write_text("old")

    def fail(*arguments):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(os, call, fail)
    refused(f"cannot write '{path}': Input/output error", write, path, error=OSError)
    assert path.read_text() == "old" and files(tmp_path) == [path.name]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)), atomic(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise error
    assert (tmp_path / "a").read_text() == "old" and files(tmp_path) == ["a"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_link_stays_and_leads_to_what_is_new(tmp_path, write):
    (tmp_path / "far").mkdir()
    target, link, dangling = tmp_path / "far" / "target.png", tmp_path / "link.png", tmp_path / "dangling.png"
    target.write_text("old")
    link.symlink_to("far/target.png")
    dangling.symlink_to("far/new.png")
    for path in (link, dangling):
        write(path)
    assert link.is_symlink() and dangling.is_symlink()
    assert target.read_bytes() != b"old" and (tmp_path / "far" / "new.png").is_file()
    assert files(tmp_path / "far") == ["new.png", "target.png"]
    assert files(tmp_path) == ["dangling.png", "far", "link.png"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_only_regular_files_are_replaced(tmp_path, write):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "null.png").symlink_to(os.devnull)
    before = files(tmp_path)
    messages = {
        "folder.png": "folder.png' is a folder: give the path of a file",
        "fifo.png": "fifo.png' is a device or a pipe",
    }
    messages |= {"loop.png": "loop.png' is a link to itself", "null.png": "null.png' is a device or a pipe, not a file"}
    for name, message in messages.items():
        refused(message, write, tmp_path / name, error=OSError)
    assert files(tmp_path) == before and stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_permissions_and_long_names(tmp_path):
    private = tmp_path / "private"
    private.touch(mode=0o600)
    write(private)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    mask = os.umask(0o027)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    write(tmp_path / ("ä" * 127))  # 254 bytes, of the 255 that a name may have
    refused("cannot write .*: Not a directory", write, private / "below" / "a", error=OSError)


def test_new_files_never_replace_another(tmp_path, monkeypatch):
    def no_links(*arguments):
        raise OSError(1, "Operation not permitted")

    for name in "ab":
        write(tmp_path / name, "first", new=True)
        refused(f"{name}': File exists", write, tmp_path / name, "second", new=True, error=FileExistsError)
        assert (tmp_path / name).read_text() == "first"
        monkeypatch.setattr(os, "link", no_links)  # as on FAT
    assert files(tmp_path) == ["a", "b"]


def test_writers_at_the_same_time(tmp_path):
    """One of the complete contents wins; no writer uses the temporary file of another."""
    texts = [str(i) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(write, tmp_path / "a", text) for text in texts * 10]:
            done.result()
    assert (tmp_path / "a").read_text() in texts and files(tmp_path) == ["a"]


KILLED = """
import sys, time
from pathlib import Path
from ldm.checkpoint.atomic import Lock, atomic
lock = Lock(Path(sys.argv[1]), "taken")
with atomic(Path(sys.argv[1], "a")) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


def start(folder) -> subprocess.Popen:
    """A process that has locked the folder and is in the middle of writing `a`."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_killed_processes_leave_is_swept_and_what_living_ones_use_is_not(tmp_path):
    living, other = start(tmp_path / "living"), start(tmp_path / "killed")
    other.send_signal(signal.SIGKILL)
    other.wait()
    try:
        for name, left in (("living", [".a.0.tmp", ".lock"]), ("killed", [".lock"])):
            folder = tmp_path / name
            assert files(folder) == [".a.0.tmp", ".lock"]
            (folder / ".mine.tmp").touch()  # a user's
            sweep(folder)
            assert files(folder) == sorted([*left, ".mine.tmp"])
        refused("taken", Lock, tmp_path / "living", "taken")
        Lock(tmp_path / "killed", "taken").release()
        write(tmp_path / "living" / "a")  # beside the other's temporary file
        assert files(tmp_path / "living") == [".a.0.tmp", ".lock", ".mine.tmp", "a"]
    finally:
        living.kill()
        living.wait()
    write(tmp_path / "living" / "a", "third")  # takes over what the killed process left
    assert files(tmp_path / "living") == [".lock", ".mine.tmp", "a"]


@pytest.mark.parametrize("way", ["swap", "two renames"])
def test_a_folder_survives_kill_at_every_line(warm_python, tmp_path, way):
    """It is the old or the new one; with two renames, at the latest when it is written next, even if that fails."""
    code = "import runpy; runpy.run_module('folder_kills', run_name='__main__')"
    done = warm_python(code, tmp_path / "out", way)
    assert done.returncode == 0, done.stderr
    *outcomes, last = done.stdout.split()
    assert {*outcomes} == {"old", "new"} and last == "finished" and len(outcomes) >= 30


def test_two_folders_written_at_the_same_time(tmp_path):
    (tmp_path / ".out.0.tmp").write_text("a file's")
    with atomic_folder(tmp_path / "out") as first:
        (first / "a").touch()
        replace_folder(tmp_path / "out")
    assert files(tmp_path) == [".out.0.tmp", "out"] and files(tmp_path / "out") == ["a"]


def test_a_lock_leaves_nothing_and_a_child_does_not_hold_it(tmp_path):
    lock = Lock(tmp_path / "run", "taken")
    refused("taken", Lock, tmp_path / "run", "taken")
    (read, end), (ready, begun) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # lives until the pipe closes
        os.close(end)
        os.write(begun, b"x")
        os.read(read, 1)
        os._exit(0)
    os.read(ready, 1)
    lock.file.close()  # as if this process had been killed: the file stays
    Lock(tmp_path / "run", "taken").release()
    os.close(end)
    os.waitpid(child, 0)
    assert files(tmp_path) == ["run"] and files(tmp_path / "run") == []  # the folder was there
    Lock(tmp_path / "new", "taken").release()
    assert files(tmp_path) == ["run"]


LARGE = {
    "atomic": lambda path: write(path, "x" * 400_000),
    "safetensors": lambda path: save_file(path, {"a": torch.zeros(100_000)}),
    "torch": lambda path: save_torch(path, {"a": {"b": torch.zeros(50_000)}, "c": [torch.zeros(50_000)]}),
    "png": lambda path: save_image(Image.effect_noise((400, 500), 99), path, "text"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_with_the_bytes(tmp_path, name):
    """A limit on the size of files stands for the disk."""
    path = tmp_path / "a.png"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            LARGE[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said, needed = str(caught.value), {"safetensors": "400,000", "torch": "400,000"}.get(name, "100,000")
    assert said.startswith(f"cannot write '{path}': ")
    assert f"(it needs {needed} bytes; " in said and "bytes are free" not in said and "unexpected pos" not in said
    assert path.read_text() == "old" and files(tmp_path) == [path.name]


def test_only_a_full_disk_is_called_so(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a storage is damaged")

    monkeypatch.setattr(torch, "save", fail)
    refused("^a storage is damaged$", save_torch, tmp_path / "a.pt", {}, error=RuntimeError)
    assert files(tmp_path) == []


def test_a_failed_write_gives_its_space_back_before_the_message(tmp_path):
    with pytest.raises(ValueError, match="stop"), atomic(tmp_path / "a") as temporary:
        temporary.write_bytes(bytes(1000))
        file = open(temporary, "rb")  # as the lock is: a file that is only unlinked keeps its bytes
        raise ValueError("stop")
    with file:
        assert os.fstat(file.fileno()).st_size == 0
