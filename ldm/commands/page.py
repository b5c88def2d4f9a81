"""Write a web page on which models run in the visitor's browser: a folder for any file server.

ldm page page/
ldm page page/ --ckpt runs/emoji/diffusion/model.safetensors --example "a red apple" --example "a green apple"
python -m http.server -d page
"""

import argparse
import gzip
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ldm.checks import check_file
from ldm.cli import ALLOW, Parser
from ldm.input_files import folder_that_ships
from ldm.model_names import model_names, model_row

PACKAGE = "onnxruntime-web@1.30.0"  # of npm; what computes the networks in the browser
ARCHIVE = PACKAGE.replace("@", "-") + ".tgz"
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.example and len(args.ckpt) > 1:
        raise ValueError(f"--example is for one model, and --ckpt names {len(args.ckpt)}: write a page for each")
    names = model_names(args.ckpt)
    if args.output.exists() and not (args.output.is_dir() and _is_page(args.output)):
        raise ValueError(f"{str(args.output)!r} is not an empty folder, nor a page: nothing there is replaced")

    from ldm.checkpoint.atomic_folder import atomic_folder

    with atomic_folder(args.output) as folder:
        for path in folder_that_ships("web").iterdir():
            shutil.copy(path, folder / path.name)
        rows = [_write_model(path, folder / name, args.example) for path, name in zip(args.ckpt, names, strict=True)]
        runtime = _write_runtime(args.runtime, folder / "onnxruntime")
        (folder / "models.json").write_text(json.dumps({"runtime": runtime, "models": rows}, indent=1))
    print(f"{args.output}: {sum(path.stat().st_size for path in args.output.rglob('*') if path.is_file()):,} bytes")
    print(f"see it at http://localhost:8000 with: python -m http.server -d {args.output}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("output", type=Path, metavar="FOLDER", help="where to write; an older page is replaced at the end")
    what = "the models, text-to-image or unconditional ones that ONNX files can hold (digits emoji)"
    add("--ckpt", nargs="+", default=["digits", "emoji"], metavar="MODEL", help=what)
    what = "a prompt that the page offers; the first is what it begins with"
    add("--example", action="append", default=[], metavar="TEXT", help=what)
    what = f"{ARCHIVE}, as `npm pack {PACKAGE}` brings it (by default that of this folder, or npm is called)"
    add("--runtime", type=Path, metavar="FILE", help=what)
    add("--allow", **ALLOW)
    return parser.parse_args(argv)


def _is_page(folder: Path) -> bool:
    """Return whether a folder is empty, or has what this command writes."""
    own = {"index.html", "page.js", "worker.js", "models.json", "onnxruntime"}
    return own <= (found := {path.name for path in folder.iterdir()}) or not found


def _write_model(path: str, folder: Path, examples: list[str]) -> dict[str, object]:
    """Write a model's compressed ONNX files; return its row of models.json."""
    import ldm

    model = ldm.load(path, device="cpu")
    for note in [*model.notes, *ldm.save(model, folder, "fp16", "onnx")]:
        print(note)
    for file in folder.glob("*.onnx"):
        _compress(file.read_bytes(), file)
        file.unlink()
    own: dict[str, object] = {"name": folder.name, "folder": folder.name, "bytes": _size(folder)}
    return own | model_row(str(path), examples)


def _write_runtime(archive: Path | None, folder: Path) -> int:
    """Write what computes the networks, from npm's package; return how many bytes a visitor loads of it."""
    folder.mkdir()
    with TemporaryDirectory() as temporary:
        if archive is None:
            archive = Path(ARCHIVE) if Path(ARCHIVE).is_file() else _packed(Path(temporary))
        check_file(archive, "archive of onnxruntime-web")
        try:
            with tarfile.open(archive) as tar:
                for name in RUNTIME:
                    file = tar.extractfile(f"package/dist/{name}")
                    (folder / name).write_bytes(b"" if file is None else file.read())
        except (tarfile.TarError, KeyError, EOFError) as error:
            raise ValueError(f"{str(archive)!r} is not npm's {PACKAGE}: {error}") from None
    compiled = folder / RUNTIME[1]
    _compress(compiled.read_bytes(), compiled)
    compiled.unlink()
    return _size(folder)


def _packed(folder: Path) -> Path:
    """Let npm bring the package, which checks its hash."""
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), PACKAGE]
    if shutil.which("npm") is None:
        raise ValueError(f"the page needs npm's {PACKAGE}, and there is no npm here: give --runtime {ARCHIVE}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (folder / ARCHIVE).is_file():
        said = next(iter(done.stderr.strip().splitlines()), "it wrote nothing")
        raise ValueError(f"npm cannot bring {PACKAGE} ({said}): bring it, and give --runtime {ARCHIVE}")
    return folder / ARCHIVE


def _compress(data: bytes, path: Path) -> None:
    """Write PATH.gz: most file servers send files as they are."""
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(data, 9, mtime=0))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
