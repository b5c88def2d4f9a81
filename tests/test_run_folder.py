"""The folder of a run: going on with it, moved or finished; one run at a time; what is kept, damaged or full."""

import json
import os
import shutil
import signal
import time
from importlib.util import find_spec

import pytest
import torch
from conftest import refused
from test_loop import assert_same, config, wait_for
from tiny_stages import STAGES, config_of, write_inputs

import ldm
from ldm.checkpoint.file import STEP_KEY, checkpoint_at, file_hash, load_file, newest_checkpoint
from ldm.checkpoint.tensors import read_tensors
from ldm.checkpoint.writing import save_file
from ldm.finetune.flags import move_in
from ldm.training import loop
from ldm.training.loop import Interrupted, train
from ldm.training.loop_settings import LoopSettings
from ldm.training.rehearsal import rehearse
from ldm.training.resuming import FREE
from ldm.training.run_folder import RunFolder, files_of, flatten


def resume(outdir, **settings):
    return train(config(outdir, **settings), resume=True, device="cpu")


def signalled(number: int):
    """A stand-in for the preview, which sends the process a signal."""
    return lambda *arguments: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A run of four steps, finished; a checkpoint is kept after the third."""
    return train(config(tmp_path_factory.mktemp("four"), steps=4, keep_every=3, preview_every=9), device="cpu").parent


@pytest.fixture
def run(four, tmp_path):
    """A copy of it, in another place."""
    return shutil.copytree(four, tmp_path / "autoencoder")


def test_a_finished_run_goes_on_as_if_it_had_not_ended(run, tmp_path, capfd):
    """... nor been moved, nor kept a checkpoint on the way; and what has no effect is said."""
    longer = {"steps": 6, "preview_every": 9}
    three = train(config(tmp_path / "three", steps=3, preview_every=9), device="cpu")
    assert_same(three, run / "model-000003.safetensors")
    assert load_file(three)[0] == load_file(run / "model-000003.safetensors")[0]
    assert resume(tmp_path, **longer) == run / "model.safetensors"
    assert "resumed with other settings of loop.keep_every, loop.steps than" in capfd.readouterr().err
    assert_same(train(config(tmp_path / "alone", **longer), device="cpu"), run / "model.safetensors")
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == [2, 3, 4, 6]
    written = (run / "model.safetensors").stat().st_mtime_ns
    changed = config(tmp_path, **longer)
    changed["stage"] = changed["stage"] | {"params": changed["stage"]["params"] | {"learning_rate": 1.0}}
    train(changed, resume=True, device="cpu")
    resume(tmp_path, steps=5)
    said = capfd.readouterr().err
    for names in ("stage.params.learning_rate", "loop.preview_every, loop.steps"):
        assert f"finished, with 6 steps: without more (loop.steps) the new settings of {names} have no effect" in said
    assert (run / "model.safetensors").stat().st_mtime_ns == written
    (run / "resume.pt").unlink()
    refused("finished, with 6 steps, and its state was not kept .loop.keep_state.*to 7", resume, tmp_path, steps=7)


def test_a_state_that_is_not_to_be_kept(tmp_path):
    path = train(config(tmp_path, steps=1, keep_state=False, report_to="none"), device="cpu")
    assert not (path.parent / "resume.pt").exists()


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Return a function that trains 4 steps, stopped after the third (state of the second) and resumed -> the run."""

    def run(outdir, report_to):
        settings = {"steps": 4, "log_every": 1, "preview_every": 2, "save_every": 2, "report_to": report_to}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunFolder, "log", killed_at(3))
            with pytest.raises(RuntimeError, match="killed"):
                train(validated(outdir, settings), device="cpu")
        time.sleep(1)  # event files are read by name: the second, then a count as text (10 before 9)
        return train(validated(outdir, settings), resume=True, device="cpu").parent

    return run


def validated(outdir, settings):
    given = config(outdir, **settings)
    return given | {"data": given["data"] | {"validation": 0.1}}


def killed_at(last: int):
    def log(self, step, values):
        own_log(self, step, values)
        if step == last:
            raise RuntimeError("killed")

    own_log = RunFolder.log
    return log


def test_tensorboards_points_go_on_where_the_state_ends(reported, tmp_path):
    """In the run's own folder: each step once, and its value as in metrics.jsonl; previews too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = reported(tmp_path, "tensorboard")
    found = EventAccumulator(str(folder)).Reload()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [(point.step, point.value) for point in found.Scalars("error")]
    assert points == [(line["step"], pytest.approx(line["error"])) for line in lines if "error" in line]
    assert [step for step, _ in points] == [1, 2, 3, 4]
    assert [image.step for image in found.Images("preview")] == [2, 4]
    measured = {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    assert {point.step: pytest.approx(point.value) for point in found.Scalars("validation/loss")} == measured
    assert [*measured] == [2, 4]


def test_wandb(reported, tmp_path, monkeypatch):
    """Where it is installed, one run, which resuming goes on with; else one sentence."""
    if find_spec("wandb") is None:
        refused("report_to wandb needs a package that is not installed: pip install wandb", reported, tmp_path, "wandb")
        return
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = [path.name for path in (reported(tmp_path, "wandb") / "wandb").glob("offline-run-*")]
    assert len(names) == 2 and len({name.rpartition("-")[2] for name in names}) == 1


@pytest.mark.parametrize(("given", "expected"), [(True, "tensorboard"), (False, "none")])
def test_the_earlier_name_of_report_to(given, expected):
    before = {"name": "x", "loop": {"steps": 1, "batch_size": 1, "tensorboard": given}}
    assert LoopSettings.of(before).report_to == expected
    refused("'tensorboard'; it takes", LoopSettings.of, {**before, "loop": before["loop"] | {"report_to": "none"}})


def test_every_setting_of_the_loop_is_free_or_decides_the_past():
    fixed = {name for name in LoopSettings.__dataclass_fields__ if not FREE.fullmatch(f"loop.{name}")}
    assert fixed == {"ema", "ema_snapshots"}
    for key in (
        "stage.params.text_learning_rate.words",
        "stage.params.relative_learning_rate",
        "loop.lr_schedule.name",
    ):
        assert FREE.fullmatch(key)
    assert not FREE.fullmatch("stage.params.ch_mult.0")


def test_moved_data_and_what_is_beside_the_run(run, tmp_path):
    """Paths below the run's folder, or its outdir, are relative to it; a path that is gone was moved."""
    saved = (run / "config.yaml").read_text()
    old, new = tmp_path / "old" / "images", tmp_path / "images"
    new.mkdir()
    paths = {"sheet": "{0}/autoencoder/sheet.png", "other": "{0}/clip/model.safetensors", "root": "{1}"}
    home = saved.split("outdir: ")[1].split("\n")[0]
    lines = "".join(f"  {key}: {path.format(home, old)}\n" for key, path in paths.items())
    (run / "config.yaml").write_text(f"{saved}extra:\n{lines}")
    moved = config(tmp_path, steps=4, keep_every=3, preview_every=9)
    moved["extra"] = {key: path.format(tmp_path, new) for key, path in paths.items()}
    assert train(moved, resume=True, device="cpu") == run / "model.safetensors"
    moved["extra"]["root"] = str(tmp_path / "others")
    refused("other settings of extra.root: resume", train, moved, resume=True, device="cpu")


def test_a_run_that_saved_nothing_is_started_anew(run, tmp_path):
    """By the same command, with or without --resume, with other settings too; and --resume starts where nothing is."""
    for path in [run / "resume.pt", *run.glob("*.safetensors")]:
        path.unlink()
    assert train(config(tmp_path, steps=1) | {"seed": 5}, device="cpu") == run / "model.safetensors"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1]
    assert resume(tmp_path / "new", steps=1).is_file()


def test_dreambooths_resume_starts_where_nothing_is(tmp_path, capfd):
    (tmp_path / "out" / "class").mkdir(parents=True)  # killed while it generated class images
    move_in("latest", tmp_path / "out")
    assert "holds no run to resume: it starts anew" in capfd.readouterr().err


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Return the configurations of an autoencoder, two steps of which are trained, and of its decoder, likewise."""
    monkeypatch.chdir(tmp_path)
    first, second = config_of("autoencoder"), config_of("decoder")
    second["stage"]["params"]["first_stage"] = "out/autoencoder/model.safetensors"
    for stage in (first, second):
        train(stage, device="cpu")
    return first, second


def with_steps(stage, steps):
    return stage | {"loop": stage["loop"] | {"steps": steps}}


def test_a_run_does_not_go_on_with_another_first_stage(chain, tmp_path, capfd):
    """Also where one command would train both on, before it does; the same file, written anew, is none."""
    first, second = chain
    path, cpu = tmp_path / "out" / "autoencoder" / "model.safetensors", torch.device("cpu")
    path.write_bytes(path.read_bytes())
    both = [with_steps(stage, 3) for stage in chain]
    said = (
        "out/decoder' was started with the weights in 'out/autoencoder/model.safetensors', and .*decoder.loop.steps=N"
    )
    refused(said, rehearse, both, True, cpu)
    rehearse([first, with_steps(second, 3)], True, cpu)
    train(with_steps(second, 3), resume=True, device="cpu")
    train(with_steps(first, 3), resume=True, device="cpu")
    now = file_hash(path)
    said = f"started with other weights of stage.params.first_stage: .*model.safetensors' is not .* begins with {now}, "
    for steps in (3, 4):  # finished, or not
        refused(said, rehearse, [with_steps(second, steps)], True, cpu)
        refused(said, train, with_steps(second, steps), resume=True, device="cpu")
    state = torch.load(tmp_path / "out/decoder/resume.pt", weights_only=True)
    del state["built_on"]  # as an earlier version saved it
    torch.save(state, tmp_path / "out/decoder/resume.pt")
    train(with_steps(second, 4), resume=True, device="cpu")
    state = torch.load(tmp_path / "out/decoder/resume.pt", weights_only=True)
    assert state["built_on"] == {"stage.params.first_stage": now}


def test_every_file_of_weights_that_a_stage_names_is_remembered(tmp_path, monkeypatch):
    """Those of the tiny stages, and what these leave out; a folder of images or a tokenizer's word is none."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    more = {
        "autoencoder": {"perceptual": "judge"},
        "dreambooth": {"loading": {"vae": "first_stage", "variant": "model"}},
    }
    more["diffusion"] = {"start": "model"}
    found = set()
    for name in STAGES:
        given = config_of(name)
        given["stage"]["params"] |= more.get(name, {})
        files = {k: v for k, v in flatten(given).items() if v in ("first_stage", "cond_stage", "judge", "model")}
        files.pop("stage.params.loading.variant", None)
        assert {key: str(path) for key, path in files_of(given).items()} == files, name
        found |= {key.removeprefix("stage.params.") for key in files}
    assert found == {"first_stage", "cond_stage", "start", "perceptual", "ckpt", "loading.vae"}


DAMAGE = {
    "config.yaml": [b"\0\1", b"- a\n- b\n", b"name: [", b"text", b""],
    "resume.pt": [b"", b"PK\3\4 half a file", "list", "no step"],
    "model.safetensors": [b"", b"text" * 99],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_named(run, tmp_path, name):
    for content in DAMAGE[name]:
        if isinstance(content, str):
            torch.save([1, 2] if content == "list" else {"step": "one"}, run / name)
        else:
            (run / name).write_bytes(content)
        refused(f"{name}'.*(damaged|safetensors|is empty)", resume, tmp_path, steps=5, keep_every=3, preview_every=9)
    if name == "config.yaml":  # as the message says
        (run / name).unlink()
        assert resume(tmp_path, steps=5).is_file()


def test_damaged_metrics_lose_their_damaged_lines(run, tmp_path):
    (run / "metrics.jsonl").write_bytes(b'{"step": 1}\n[1]\n\xff\n{}\n{"step": 2}\n{"step": 9}\n{"ste')
    resume(tmp_path, steps=5, log_every=5)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 5]


def test_a_run_folder_is_a_checkpoint(four, tmp_path):
    """The longest trained one in it: in the middle of going on with a finished run that is not the result."""
    assert checkpoint_at(four) == newest_checkpoint(four) == four / "model.safetensors"
    state = load_file(four)[1]
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(four / "model.safetensors")[1].items())
    run = shutil.copytree(four, tmp_path / "run")
    save_file(run / "model-000010.safetensors", {"a": torch.ones(1)}, {})
    save_file(run / "model-000009.safetensors", {"a": torch.ones(1)}, {})
    save_file(run / "model-best.safetensors", {"a": torch.ones(1)}, {})
    assert newest_checkpoint(run) == run / "model-000010.safetensors"
    assert read_tensors(four / "model.safetensors").metadata[STEP_KEY] == "4"
    for path in run.glob("*.safetensors"):
        path.unlink()
    for function in (ldm.load, load_file, checkpoint_at):
        refused("the run in .* has no checkpoint yet: .*loop.keep_every=N", function, run, error=FileNotFoundError)


@pytest.mark.smoke
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_save_and_are_as_before_afterwards(run, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    monkeypatch.setattr(loop, "preview", signalled(number))
    refused("stopped at step 5, saved in .*--resume", resume, tmp_path, steps=6, preview_every=1, error=Interrupted)
    assert torch.load(run / "resume.pt", weights_only=True)["step"] == 5 and signal.getsignal(number) is before
    (run / "model.safetensors").unlink()
    refused("has 5 steps already: loop.steps must be at least that", resume, tmp_path, steps=4, keep_every=1)


TWO = """
import os, signal, time
from ldm.training import loop

def wait(*arguments):
    while not os.path.exists({end!r}):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

loop.preview = wait  # in the second step, after the first state was saved
settings = {settings}
settings["loop"] |= {{"steps": 400, "workers": {workers}}}
loop.train(settings, device="cpu")
"""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.full)])
def test_two_runs_in_one_folder(warm_python, tmp_path, workers):
    """The second is refused while the first lives, and not after its kill -9, even if its data loader still lives."""
    state, end = tmp_path / "autoencoder" / "resume.pt", tmp_path / "end"
    settings = config(tmp_path, save_every=1, preview_every=2, report_to="none")

    def second():
        try:
            wait_for(state)
            refused("autoencoder' is being trained in by another process: wait", resume, tmp_path, steps=400)
        finally:
            end.touch()

    code = TWO.format(settings=settings, workers=workers, end=str(end))
    assert warm_python(code, meanwhile=second).returncode == -signal.SIGKILL
    step = torch.load(state, weights_only=True)["step"]
    settings = {"steps": step + 1, "report_to": "none", "workers": workers}
    assert resume(tmp_path, **settings) == tmp_path / "autoencoder" / "model.safetensors"
    assert not [path for path in (tmp_path / "autoencoder").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("rate", [1e30, 1e9])
def test_no_result_where_the_weights_are_absurd(run, tmp_path, rate):
    for outdir, more, advice in (
        (tmp_path / "new", 1, "nothing was saved yet: start again with a lower learning rate"),
        (tmp_path, 5, "the last saved state is in .*--resume and a lower learning rate"),
    ):
        settings = config(outdir, steps=more, keep_every=3, preview_every=9)
        settings["stage"] = settings["stage"] | {"params": settings["stage"]["params"] | {"learning_rate": rate}}
        refused(f"autoencoder: .* became .*by step {more}, so training stopped; {advice}", train, settings, resume=True)
    assert not list((tmp_path / "new").rglob("*.safetensors")) and not list((tmp_path / "new").rglob("*.pt"))
    assert read_tensors(run / "model.safetensors").metadata[STEP_KEY] == "4"
