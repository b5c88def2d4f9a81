"""The training loop: exact resume, errors, and what it writes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, refused
from PIL import Image
from safetensors.torch import load_file

from ldm.labels import GAP, LINE
from ldm.training import loop
from ldm.training.loop import Interrupted, train
from ldm.training.loop_settings import LoopSettings
from ldm.training.metrics import Metrics
from ldm.training.processes import mixed_precision
from ldm.training.run_folder import RunFolder
from ldm.training.share import BatchShare

AUTOENCODER = {
    "target": "ldm.training.autoencoder.AutoencoderStage",
    "params": TINY["first_stage_config"]["params"]
    | {
        "learning_rate": 1e-3,
        # Two optimizers, so that the resumed state of both is tested.
        "discriminator": {"input_nc": 1, "ndf": 8, "n_layers": 1},
        "disc_start": 2,
        "preview_columns": 2,
    },
}


def config(outdir: Path, **settings) -> dict:
    return {
        "name": "autoencoder",
        "outdir": str(outdir),
        "seed": 3,
        "stage": AUTOENCODER,
        "data": {"target": "ldm.data.digits.Digits", "params": {"first": 40}},
        "loop": {"steps": 6, "batch_size": 8, "log_every": 2, "preview_every": 3, "precision": "fp32"} | settings,
    }


def assert_same(a: Path, b: Path) -> None:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def interrupt(*arguments) -> None:
    """Press Ctrl-C; in place of the preview."""
    os.kill(os.getpid(), signal.SIGINT)


def wait_for(state: Path, process: subprocess.Popen | None = None) -> None:
    """Wait until a run has saved its first state."""
    deadline = time.time() + 600
    while not state.exists() and (process is None or process.poll() is None) and time.time() < deadline:
        time.sleep(0.005)
    assert state.exists(), "the run saved nothing within ten minutes"


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run of 6 steps of 2 micro-batches (5 batches an epoch: it crosses epochs mid-step) that nobody disturbs."""
    return train(config(tmp_path_factory.mktemp("alone"), accumulate=2), device="cpu")


def test_run_folder(alone):
    folder = alone.parent
    assert {p.name for p in folder.iterdir() if "tfevents" not in p.name} == {
        "config.yaml",
        "metrics.jsonl",
        "model.safetensors",
        "previews",
        "resume.pt",
    }
    assert any("tfevents" in p.name for p in folder.iterdir())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert {"error", "kl", "adversarial", "discriminator", "grad_norm_0", "grad_norm_1"} <= lines[-1].keys()
    assert [p.name for p in sorted((folder / "previews").iterdir())] == ["000003.png", "000006.png"]
    with Image.open(folder / "previews" / "000006.png") as sheet:
        assert sheet.height == 4 * (LINE + GAP + 64) + GAP  # twice images and their reconstructions, under labels


@pytest.mark.smoke
@pytest.mark.parametrize("first_version", [False, True])
def test_interrupted_between_steps_and_resumed_is_bit_identical(alone, tmp_path, monkeypatch, first_version):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "preview", interrupt)  # Ctrl-C in step 3, in the middle of the second epoch
        with pytest.raises(Interrupted, match="stopped at step 3, saved in .*--resume"):
            train(config(tmp_path, accumulate=2), device="cpu")
    saved = tmp_path / "autoencoder" / "resume.pt"
    if first_version:  # the same state as version 0.1.0 first saved it
        state = torch.load(saved, weights_only=True)
        optimizers = [state[f"optimizer_{k}"] for k in range(2)]
        networks = {"batches": torch.tensor(2 * state["step"]), **state["networks"]}
        old = {"stage": networks, "optimizers": optimizers, "scaler": None}
        torch.save({"step": state["step"], "ema": state["ema"], **old}, saved)
    torch.manual_seed(99)  # nothing may depend on the random state of the process
    assert_same(train(config(tmp_path, accumulate=2), resume=True, device="cpu"), alone)


KILLED = """
import os, signal, threading, time, torch
from ldm.training.loop import train

def kill():
    while not os.path.exists({state!r}):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads({threads})
threading.Thread(target=kill, daemon=True).start()
train({settings}, device="cpu")
"""


@pytest.mark.smoke
def test_killed_and_resumed_is_bit_identical(warm_python, alone, tmp_path):
    """kill -9 at an arbitrary moment after the first save."""
    settings, state = config(tmp_path, accumulate=2, save_every=1), tmp_path / "autoencoder" / "resume.pt"
    code = KILLED.format(threads=torch.get_num_threads(), state=str(state), settings=settings)
    assert warm_python(code).returncode == -signal.SIGKILL and state.exists()
    assert_same(train(settings, resume=True, device="cpu"), alone)


@pytest.fixture
def scaled(monkeypatch):
    """Gradients scaled as in fp16, on a CPU in fp32: by 2^19 at first, four times as much after 2 good steps, and half
    as much after an overflow, which is what anything above 2^20 makes.
    """
    scales = []

    class Scaler(torch.amp.GradScaler):
        def scale(self, outputs):
            return super().scale(outputs) * (torch.inf if self.get_scale() > 2**20 else 1.0)

        def update(self, new_scale=None):
            super().update(new_scale)
            scales.append(self.get_scale())

    def make(*settings):
        accelerator = make_accelerator(*settings)
        accelerator.scaler = Scaler("cpu", init_scale=2.0**19, growth_factor=4.0, growth_interval=2)

        def unscale_gradients():  # accelerate's own looks for fp16
            accelerator.scaler.unscale_(accelerator._optimizers[0].optimizer)

        accelerator.unscale_gradients = unscale_gradients
        return accelerator

    make_accelerator = loop.make_accelerator
    monkeypatch.setattr(loop, "make_accelerator", make)
    return scales


def test_scaled_gradients(scaled, tmp_path, monkeypatch):
    """A step whose gradients overflow is skipped and not reported; resumed in the middle, the scale goes on."""

    def one_optimizer(name, **settings):
        whole = config(tmp_path / name, accumulate=2, log_every=1, preview_every=4, ema=0.0, **settings)
        return whole | {"stage": AUTOENCODER | {"params": AUTOENCODER["params"] | {"discriminator": None}}}

    path = train(one_optimizer("whole"), device="cpu")
    whole = list(scaled)
    assert np.log2(whole).tolist() == [19, 21, 20, 20, 22, 21]  # the third and the sixth step overflow
    lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert [line["step"] for line in lines if "grad_norm_0" in line] == [1, 2, 4, 5]
    assert max(line.get("grad_norm_0", 0) for line in lines) < 100  # of gradients that are scaled back
    five, six = load_file(train(one_optimizer("five", steps=5), device="cpu")), load_file(path)
    weights = [name for name in five if name.endswith(".weight")]
    assert weights and all(torch.equal(five[name], six[name]) for name in weights)  # the sixth step was skipped
    scaled.clear()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "preview", interrupt)
        with pytest.raises(Interrupted):
            train(one_optimizer("parts"), device="cpu")
    assert_same(train(one_optimizer("parts"), resume=True, device="cpu"), path)
    assert scaled == whole
    refused("fp16 is for one optimizer, and 'autoencoder' has 2", train, config(tmp_path / "two"), device="cpu")


@pytest.mark.full
def test_two_processes_killed_and_resumed_are_bit_identical(tmp_path):
    """As above under torchrun: one state for both, and each goes on with its own half of the data."""

    def launch(folder, resume: bool, steps: int = 30) -> subprocess.Popen:
        settings = config(folder, steps=steps, save_every=1, report_to="none")
        script = folder.parent / "run.py"
        folder.mkdir(exist_ok=True)
        script.write_text(
            "import json, os, sys\nfrom pathlib import Path\nfrom ldm.training.loop import train\n"
            "Path(sys.argv[3], os.environ['RANK']).write_text(str(os.getpid()))\n"
            "train(json.loads(sys.argv[1]), resume=sys.argv[2] == 'True', device='cpu')"
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
        command += [json.dumps(settings), str(resume), str(folder)]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})

    assert launch(tmp_path / "alone", False).wait() == 0
    process = launch(tmp_path / "killed", False)
    wait_for(tmp_path / "killed" / "autoencoder" / "resume.pt", process)
    workers = [int((tmp_path / "killed" / rank).read_text()) for rank in "01"]
    for pid in (process.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert launch(tmp_path / "killed", True).wait() == 0
    paths = [tmp_path / name / "autoencoder" / "model.safetensors" for name in ("killed", "alone")]
    assert_same(*paths)


def test_accumulation_equals_the_larger_batch(tmp_path):
    """Without stochastic layers two micro-batches of 4 give the gradient of one batch of 8, up to rounding."""
    stage = {
        "target": AUTOENCODER["target"],
        "params": {**AUTOENCODER["params"], "discriminator": None, "normalize": False},
    }
    paths = []
    for name, settings in {"large": {"batch_size": 8}, "small": {"batch_size": 4, "accumulate": 2}}.items():
        path = train(config(tmp_path / name, steps=1, report_to="none", **settings) | {"stage": stage}, device="cpu")
        paths.append(json.loads((path.parent / "metrics.jsonl").read_text()))
    # the posterior's noise differs between the two, its size does not: errors agree to a few per cent
    assert paths[0]["kl"] == pytest.approx(paths[1]["kl"], rel=1e-4)


def test_nan_stops_with_the_step_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    good = {"steps": 8, "log_every": 1, "save_every": 2, "report_to": "none"}
    settings = config(tmp_path, **good)
    from ldm.training.autoencoder import AutoencoderStage

    turn = AutoencoderStage.turn

    def broken(self, batch, k, number, shared):
        loss, metrics, shared = turn(self, batch, k, number, shared)
        return (loss * float("nan"), {"error": loss * float("nan")}, shared) if number > 4 else (loss, metrics, shared)

    monkeypatch.setattr(AutoencoderStage, "turn", broken)
    refused("error became nan by step 6.*lower", train, settings, device="cpu")
    state = torch.load(tmp_path / "autoencoder" / "resume.pt", weights_only=True)
    assert state["step"] == 4
    assert all(torch.isfinite(t).all() for t in state["networks"].values())
    # ... and the advice can be taken: these settings may change on resume
    monkeypatch.setattr(AutoencoderStage, "turn", turn)
    assert train(config(tmp_path, **good, clip=0.1), resume=True, device="cpu").exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "autoencoder" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_a_weight_is_too_large_and_not_many_together(tmp_path):
    folder = RunFolder(tmp_path / "autoencoder", config(tmp_path), False, writes=False)
    weight = torch.nn.Parameter(torch.full((2, 4), 9e5))  # of norm 2.5e6
    metrics = Metrics("run", folder, torch.nn.ParameterList([weight]), BatchShare())
    assert metrics.report(1) == {}
    for bad, said in ((-1.1e6, "1.1e.06"), (float("nan"), "nan"), (float("inf"), "inf")):
        weight.data[1, 1] = bad
        refused(f"run: a weight became {said} by step 2", metrics.report, 2)


def test_an_existing_run_is_not_overwritten(alone, tmp_path):
    again = config(alone.parent.parent, accumulate=2)
    refused("already holds a run.*--resume", train, again, device="cpu")
    assert train(again, resume=True, device="cpu") == alone  # finished: nothing to do
    changed = config(alone.parent.parent, accumulate=2) | {"seed": 4}
    refused("other settings of seed", train, changed, resume=True, device="cpu")
    other = again | dict.fromkeys("abcd", 1) | {"stage": {}}
    with pytest.raises(ValueError, match=r"settings of a, b, c, d, stage\S* and \d+ more: resume"):  # another layout
        RunFolder(alone.parent, other, resume=True, writes=True)


def test_a_damaged_state_is_refused(tmp_path):
    settings = config(tmp_path)
    folder = tmp_path / "autoencoder"
    with pytest.raises(ValueError, match="fewer than one batch of .*: lower loop.batch_size"):
        train(settings | {"data": {"target": "ldm.data.digits.Digits", "params": {"first": 4}}}, device="cpu")
    assert not folder.exists()  # a mistake leaves no run behind that the corrected command would stumble on
    folder.mkdir()
    folder.joinpath("resume.pt").write_bytes(b"PK\x03\x04 half a file")
    refused("cannot resume from .* damaged", train, settings, resume=True, device="cpu")
    torch.save({"step": 1, "stage": {}}, folder / "resume.pt")
    with pytest.raises(ValueError, match="cannot resume from .*, which another version of ldm saved: resume with"):
        train(settings, resume=True, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps 0 must be an integer of at least 1"),
        ({"accumulate": 2**62}, "accumulate 4611686018427387904 must be an integer from 1 to 65536"),
        ({"workers": 10**5}, "workers 100000 must be an integer from 0 to 256"),
        ({"steps": "many"}, "steps 'many' must be an integer"),
        ({"precision": "half"}, "precision 'half' must be 'auto' or 'fp32'"),
        ({"lr_schedule": {"name": "steps"}}, "'steps' is unknown: use constant"),
        (
            {"lr_schedule": {"name": "cosine", "warmpu": 1}},
            "loop.lr_schedule: .*'warmpu'; did you mean warmup.; it takes .'name', 'warmup', 'decay'",
        ),
        ({"ema": 1.5}, "ema 1.5 must be a number from 0 to 0.999999"),
        ({"clip": 0.0}, "clip 0.0 must be a number of at least 1e-09"),
        ({"batch_size": 10**6}, "loop.batch_size 1000000 times loop.accumulate 1 .* at most 65,536 are possible"),
        ({"accumulate": 2**16}, "times loop.accumulate 65536 are 524,288 images in each training step"),
        (
            {"stepz": 1},
            "loop of 'autoencoder': .*'stepz'; did you mean steps.; it takes .'steps', 'batch_size', 'accumulate'",
        ),
    ],
)
def test_bad_settings_are_named(tmp_path, settings, message):
    refused(message, train, config(tmp_path, **settings), device="cpu")


def test_a_schedule_of_null_is_constant(tmp_path):
    assert LoopSettings.of(config(tmp_path, lr_schedule=None)).lr_schedule == {"name": "constant"}


def test_steps_beyond_the_run_are_said(tmp_path, capsys):
    train(config(tmp_path, steps=1, keep_every=5, lr_schedule={"name": "constant", "warmup": 3}), device="cpu")
    said = capsys.readouterr().err
    assert "loop.lr_schedule.warmup is 3 steps, and the run has only 1" in said and "loop.keep_every is 5 steps" in said


def test_mixed_precision_names():
    cpu = torch.device("cpu")
    assert mixed_precision("fp32", cpu) == "no"
    assert mixed_precision("bf16", cpu) == "bf16"
    assert mixed_precision("fp16", torch.device("cuda")) == "fp16"
    refused("precision fp16 trains on CUDA GPUs, not on 'cpu': use bf16 or fp32", mixed_precision, "fp16", cpu)
    assert mixed_precision("auto", cpu) in ("no", "bf16")
    assert mixed_precision("auto", torch.device("mps")) == "no"
