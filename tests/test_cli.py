"""The option parser, the number types, and how a script ends."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refused

from ldm.cli import Parser, check_writable, finite_float, int_range
from ldm.model_names import model_names
from ldm.program import run, sentence
from ldm.spelling import nearest_name


def parser() -> Parser:
    parser = Parser(prog="sample.py")
    parser.add_argument("--n_samples", type=int_range(1), default=1)
    parser.add_argument("--from-file")
    parser.add_argument("--scale", type=finite_float())
    parser.add_argument("--cfg_scale", dest="scale", type=finite_float(), help=argparse.SUPPRESS)
    parser.add_argument("--olds", help=argparse.SUPPRESS)
    parser.add_argument("-q", action="store_true")
    parser.add_argument("overrides", nargs="*")
    return parser


@pytest.mark.parametrize("spelling", ["--n_samples", "--n-samples"])
@pytest.mark.parametrize("joined", [False, True])
def test_dash_and_underscore_are_the_same(spelling, joined):
    argv = [f"{spelling}=4"] if joined else [spelling, "4"]
    assert parser().parse_args(argv).n_samples == 4


def test_both_ways_round_and_for_every_name_of_an_option():
    args = parser().parse_args(["--from_file", "a_b-c.txt", "--cfg-scale", "2"])
    assert (args.from_file, args.scale) == ("a_b-c.txt", 2.0)


def test_options_may_stand_between_positional_arguments():
    args = parser().parse_args(["a.yaml", "--n-samples", "3", "loop.steps=1", "-q", "b=2"])
    assert (args.overrides, args.n_samples, args.q) == (["a.yaml", "loop.steps=1", "b=2"], 3, True)


def test_values_are_left_alone():
    args = parser().parse_args(["--from-file=--n-samples_x", "train.max-steps_a=3", "--", "--n-samples"])
    assert args.from_file == "--n-samples_x"
    assert args.overrides == ["train.max-steps_a=3", "--n-samples"]


def test_options_that_set_the_same_thing_are_not_both_taken(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--scale", "2", "--cfg-scale=3"])
    assert "--scale and --cfg_scale set the same thing" in capsys.readouterr().err
    assert parser().parse_args(["--scale", "2", "-q", "--scale=3"]).scale == 3
    assert capsys.readouterr().err == "note: --scale is given 2 times: the last one counts\n"


def test_paths_and_numbers_may_begin_with_a_dash_and_no_path_is_empty(capsys):
    paths = parser()
    paths.add_argument("--out", type=Path)
    args = paths.parse_args(["--out", "-x/y", "--scale", "-1e-3"])
    assert (args.out, args.scale) == (Path("-x/y"), -1e-3)
    for argv, message in (
        (["--out", ""], "argument --out: the path is empty"),
        (["--out", "--skip"], "expected one"),
        (["--out", "a\0"], "has a null character"),
        (["--out", "a/" * 1000], "the path has 1,000 folders within each other: at most 256"),
    ):
        with pytest.raises(SystemExit):
            paths.parse_args(argv)
        assert message in capsys.readouterr().err


def test_a_text_may_begin_with_a_dash():
    argv = ["--from_file", "--x", "--scale", "-1", "-q", "a"]
    args = parser().parse_args(argv)
    assert (args.from_file, args.scale, args.q, args.overrides) == ("--x", -1.0, True, ["a"])
    assert parser().parse_args(["--from-file", "-x=y"]).from_file == "-x=y"
    with pytest.raises(SystemExit):
        parser().parse_args(["--from-file", "--scale", "2"])


@pytest.mark.parametrize(
    ("typed", "known", "expected"),
    [
        ("sead", ("scale", "seed"), "seed"),
        ("stpes", ("strip", "steps"), "steps"),  # two letters swapped
        ("n-sampels", ("n-samples",), "n-samples"),
        ("negativ-promt", ("negative-prompt",), "negative-prompt"),
        ("size", ("resize", "outsize"), None),
        ("emb", ("ema",), None),
        ("resume", ("resize",), None),
        ("x", (), None),
    ],
)
def test_a_hint_is_near(typed, known, expected):
    assert nearest_name(typed, known) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n-sample", "3"], "unknown option --n-sample; did you mean --n_samples?"),
        (["--from_fil=x"], "unknown option --from_fil; did you mean --from-file?"),
        (["--zzz"], "unknown option --zzz ("),
        (["--cfg-scael", "3"], "unknown option --cfg-scael; did you mean --scale?"),  # whose other name is near
        (["--old", "3"], "unknown option --old ("),  # is near an option that --help does not show
        (["-x"], "unknown option -x"),
        (["--n_samples", "0"], "0 is out of range: it must be at least 1"),
        (["--n_samples", "many"], "'many' is not an integer"),
        (["--scale", "nan"], "'nan' is not a finite number"),
        (["--scale", "inf"], "'inf' is not a finite number"),
        (["--scale", "1e308"], "it must be at most 3.40282e+38"),
        (["--scale"], "expected one argument"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        parser().parse_args(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_sub_commands_know_their_own_options(capsys):
    main = Parser(prog="evaluate.py")
    commands = main.add_subparsers(required=True)
    commands.add_parser("model").add_argument("--n_samples", type=int)
    assert main.parse_args(["model", "--n-samples", "2"]).n_samples == 2
    with pytest.raises(SystemExit):
        main.parse_args(["model", "--n-sampels", "2"])
    assert "did you mean --n_samples?" in capsys.readouterr().err


def test_number_types_have_limits():
    assert int_range(0)("7") == 7
    assert finite_float(0, infinite=True)("inf") == float("inf")
    for read, text in ((int_range(0, 5), "6"), (finite_float(0), "-0.1"), (int_range(0), "1.5")):
        refused(text, read, text, error=Exception)


def ending(error: BaseException | None, capsys) -> tuple[object, str]:
    """The exit status of `run` and what it printed, for a main that raises."""

    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (None, 0, ""),
        (ValueError("steps 0 are too few"), 2, "error: steps 0 are too few\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "error: a.txt: No such file or directory\n"),
        (MemoryError(), 2, "error: there is not enough memory: smaller images or batches need less\n"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nBacktrace"),
            2,
            "error: there is not enough memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 "
            "bytes.): smaller images or batches need less\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted: what was finished is saved\n"),
        (KeyboardInterrupt("saved; go on with --resume"), 130, "saved; go on with --resume\n"),
    ],
)
def test_how_a_script_ends(error, status, message, capsys):
    assert ending(error, capsys) == (status, message)


def test_bugs_keep_their_traceback():
    def main() -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        run(main)


def test_traceback_on_request(monkeypatch, capsys):
    monkeypatch.setenv("LDM_TRACEBACK", "1")
    status, printed = ending(ValueError("too few"), capsys)
    assert status == 2 and "Traceback" in printed and printed.endswith("error: too few\n")


def test_sentence():
    assert sentence(PermissionError(13, "Permission denied", "out/x")) == "out/x: Permission denied"
    assert sentence(OSError("disk full")) == "disk full"
    assert sentence(ValueError()) == "ValueError"


def test_check_writable(tmp_path):
    check_writable(None)
    check_writable(tmp_path / "new" / "x.png")
    assert not any(tmp_path.iterdir())
    refused("cannot be written, as it is a folder: name a file", check_writable, tmp_path, error=OSError)
    (tmp_path / "file").touch()
    refused("file: Not a directory", check_writable, tmp_path / "file" / "x.png", error=OSError)
    (tmp_path / "link").symlink_to("nowhere")
    refused("link: No such file", check_writable, tmp_path / "link" / "x.png", error=OSError)
    refused("File name too long", check_writable, tmp_path / ("x" * 300) / "x.png", error=OSError)


def test_fast_exit_keeps_output_and_status():
    assert program("print('done'); raise ValueError('not saved')") == (2, b"done\nerror: not saved\n")


def program(code: str, fast_exit: bool = True, encoding: str | None = None, shell: str = "") -> tuple[int, bytes]:
    """The status and output of a program whose main is `code`, with that redirection of the shell."""
    text = f"from ldm.program import run\ndef main():\n    {code}\nrun(main, {fast_exit})"
    environment = os.environ | ({} if encoding is None else {"PYTHONIOENCODING": encoding})
    command = ["bash", "-c", f'"$0" -c "$1" {shell}; exit ${{PIPESTATUS[0]}}', sys.executable, text]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    return done.returncode, done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_path_can_be_printed(encoding):
    """Letters that the encoding lacks are escaped; bytes of names that are not UTF-8 come out as they are."""
    shown = "ö" if encoding != "ascii" else "\\xf6"
    status, printed = program(r"print('\xf6/\u4e94/\udcff')", encoding=encoding)
    assert status == 0
    assert printed == f"{shown}/{'五' if encoding == 'utf-8' else chr(92) + 'u4e94'}/".encode(encoding) + b"\xff\n"


def test_nothing_printed_steers_the_terminal():
    """Names of files may hold escape sequences, returns and marks that turn letters around; bars of progress work."""
    name = r"a\x1b[2J\rb\x07\x9b\u202ec\u2066"
    for code in (f"print('{name}')", f"import sys; print('{name}', file=sys.stderr)", f"raise ValueError('{name}')"):
        status, printed = program(code, encoding="utf-8")
        assert printed.decode().removeprefix("error: ") == f"{name}\n"
    code = f"from ldm.commands.txt2img import main as m; m(['--from_file', '{name}'])"
    status, printed = program(code, encoding="utf-8")
    assert status == 2 and name in printed.decode().replace(r"\\", "\\") and b"\x1b" not in printed
    bars = r"from tqdm import trange; [list(trange(2, desc='\xe9\t')) for _ in trange(2, file=sys.stdout)]"
    status, printed = program(f"import sys; {bars}", encoding="utf-8")
    assert status == 0 and printed.count(b"\r") > 3 and b"\\" not in printed


@pytest.mark.parametrize("fast_exit", [True, False])
@pytest.mark.parametrize(
    ("shell", "status", "printed"),
    [("| head -0", 141, b""), ("2>&1 | head -0", 141, b""), (">&-", 0, b""), ("2>&-", 0, b"x\n"),
     (">/dev/full", 2, b"No space left on device\n")],
)  # fmt: skip
def test_nobody_reads_the_output(fast_exit, shell, status, printed):
    code = "print('x', flush=True); import time; time.sleep(0.3); print('x' * 9)" if "head" in shell else "print('x')"
    found, text = program(code, fast_exit, shell=shell)
    assert found == status and text.endswith(printed) and b"Traceback" not in text


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["digits", "runs/emoji/diffusion/model.safetensors"], ["digits", "model"]),
        (["a/x/model.safetensors", "b/x/model.safetensors", "x.ckpt"], ["a-x-model", "b-x-model", "x"]),
        (["a/digits.ckpt", "digits"], ["a-digits", "digits"]),
        (["a/x.ckpt", "a/x.safetensors"], ["x.ckpt", "x.safetensors"]),
        ([".", ".."], ["here", "above"]),
        (["/"], ["model"]),
        (["50% #1?.safetensors"], ["50% #1?"]),
    ],
    ids=str,
)
def test_names_of_models(paths, names, tmp_path, monkeypatch):
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert model_names(paths) == names


def test_a_model_that_is_named_twice():
    refused("--ckpt names one model twice: a ./a", model_names, ["a", "./a"])
    refused("--ckpt names one model twice: digits digits", model_names, ["digits", "digits"])


def test_a_report_does_not_echo_a_megabyte(capsys):
    def main():
        raise ValueError(f"the prompt {'x' * 10**6!r} is too long")

    for ends in (lambda: run(main), lambda: parser().parse_args([f"--scale={'x' * 10**6}"])):
        with pytest.raises(SystemExit) as ended:
            ends()
        assert ended.value.code == 2 and len(capsys.readouterr().err) < 500


def test_a_process_without_streams_works_on():
    """tqdm writes its bars to `sys.stderr`, which is None then."""
    code = "import os, sys; from ldm.program import run; run(lambda: (sys.stderr.write('x'), sys.stdout.write('x')))"
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        command = f"{sys.executable} -c {shlex.quote(code)} {closed}"
        assert subprocess.run(command, shell=True, check=False).returncode == 0


def test_a_warning_of_the_package_is_a_note():
    code = """
import warnings, ldm.program, ldm.images
def main():
    warnings.warn_explicit("the mask is black", UserWarning, ldm.images.__file__, 1)
    warnings.warn_explicit("somebody else's", UserWarning, "elsewhere.py", 1)
ldm.program.run(main)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.startswith("note: the mask is black\nelsewhere.py:1: UserWarning: somebody else's")
