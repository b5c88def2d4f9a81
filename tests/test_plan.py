"""`ldm train --plan`: files and weights to the byte, memory and time within 15 % of what a training then takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_stages import config_of, write_inputs
from torch import nn
from torch.utils.data import Dataset

from ldm.commands import train as command
from ldm.training import plan as planning
from ldm.training.loop import train
from ldm.training.plan import LiveTensors, Plan, describe, make_plan
from ldm.training.rehearsal import rehearse
from ldm.training.stage import Stage

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[1]


def plan_of(config: dict) -> Plan:
    found = []
    rehearse([config], False, CPU, lambda *args: found.append(make_plan(*args)))
    return found[0]


class Texts(Stage):
    """One weight matrix, whose step is known to the byte: 1000 x 1000 times a batch of vectors, and a ReLU."""

    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__(1, lr=learning_rate)
        self.networks["model"] = nn.Linear(1000, 1000, bias=False)
        self.freeze(other=nn.Linear(10, 10, bias=False))
        self.config = {}

    def loss(self, batch):
        loss = self.networks["model"](batch["image"]).relu().mean()
        return loss, {"loss": loss}


class Vectors(Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return {"image": torch.ones(1000)}


LOOP = {"steps": 10, "batch_size": 20, "precision": "fp32"}


@pytest.mark.parametrize(("free", "tried"), [(10**12, True), (0, False)], ids=["measured", "extrapolated"])
def test_a_step_that_is_known_to_the_byte(monkeypatch, free, tried):
    monkeypatch.setattr(planning, "free_memory", lambda device: free)
    loop = LOOP | {"accumulate": 3, "keep_every": 4, "ema": 0.9}
    found = make_plan({"name": "a", "loop": loop}, Texts(), Vectors(), None, CPU, processes=2)
    weights, vectors = 4 * 1000**2, 4 * 20 * 1000
    assert (found.trained, found.frozen, found.images, found.images_per_step) == (1000**2, 100, 100, 20 * 3 * 2)
    assert found.parts["weights"] == weights + 400 and found.parts["gradients"] == found.parts["averages"] == weights
    assert found.parts["optimizer"] == 2 * weights + 4  # and the number of steps
    assert found.step.flops == 3 * 2 * (2 * 20 * 1000**2)  # by accumulated batches, forward and backward of the matrix
    kept = found.step.activations  # what the loss is computed of: at least the ReLU's output
    assert vectors <= kept <= vectors + 100
    # the sum of two batches' gradients: both live while they are added
    assert found.memory == pytest.approx(found.parts["weights"] + found.parts["optimizer"] + weights * 3, rel=0.03)
    assert (found.seconds is not None) == tried
    assert found.files["2 of keep_every"] == 2 * found.files["model.safetensors"]
    assert found.checkpointed is None
    assert ("hours, at" if tried else "not tried, as memory may be too small: 0.00 MB are free") in describe(found)


def test_live_tensors_count_each_storage_once_while_it_lives():
    weight = torch.ones(10)
    with LiveTensors(CPU) as live:
        a = torch.zeros(100)
        b = a.view(10, 10)[:5]
        weight.add_(1)
        assert live.now == 400
        c = a + 1
        del a
        assert live.now == 800  # b keeps it
        del b, c
    assert (live.now, live.peak) == (0, 800)


@pytest.mark.parametrize("name", ["autoencoder", "clip", "diffusion", "ddgan"])
def test_files_are_as_large_as_planned(name, tmp_path, monkeypatch):
    """Of a training of every kind of stage with average and two optimizers where it has them; nothing is written."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    before = sorted(filter(Path.is_file, tmp_path.rglob("*")))
    config = config_of(name)
    if name == "diffusion":
        config["stage"]["params"]["cache_dir"], config["data"]["validation"] = "cache", 0.5
    found = plan_of(config)
    assert sorted(filter(Path.is_file, tmp_path.rglob("*"))) == before
    result = train(config, device="cpu")
    assert abs(result.stat().st_size - found.files["model.safetensors"]) <= 16  # digits of the scale factor
    state = torch.load(result.with_name("resume.pt"), weights_only=True)
    assert abs(result.with_name("resume.pt").stat().st_size - found.files["resume.pt"]) <= 512
    optimizers = [part["state"].values() for key, part in state.items() if key.startswith("optimizer")]
    tensors = [x for states in optimizers for values in states for x in values.values() if torch.is_tensor(x)]
    assert found.parts["optimizer"] == sum(x.numel() * x.element_size() for x in tensors)
    assert found.parts["averages"] == sum(4 * x.numel() for x in state["ema"]["shadow"].values())
    assert found.seconds is not None and found.seconds > 0
    if name == "diffusion":
        cache = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
        assert found.files["cache_dir"] == pytest.approx(cache, rel=0.01)  # headers; 0.7 % are 8 images' latents
    if found.checkpointed is not None:
        assert found.checkpointed[0] < found.checkpointed[1] == pytest.approx(found.step.activations)


def test_what_is_extrapolated_is_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    config = config_of("diffusion")
    config["loop"] |= {"batch_size": 16, "precision": "fp32"}
    measured = plan_of(config)
    monkeypatch.setattr(planning, "free_memory", lambda device: 0)
    extrapolated = plan_of(config)
    assert extrapolated.seconds is None
    assert extrapolated.step.flops == pytest.approx(measured.step.flops, rel=0.05)  # texts are encoded once
    assert extrapolated.memory == pytest.approx(measured.memory, rel=0.05)
    config["loop"]["gradient_checkpointing"] = True
    assert plan_of(config).step.activations == pytest.approx(measured.checkpointed[0], rel=0.05)


def test_the_command_prints_plans_and_writes_nothing(tmp_path, capsys):
    """Of stages that read each other's results, which are not there."""
    configs = [str(ROOT / f"configs/sklearn/{name}.yaml") for name in ("autoencoder", "clip", "diffusion")]
    short = ["loop.batch_size=4", f"outdir={tmp_path / 'out'}", "data.params.first=40", "--device=cpu"]
    command.main([*configs, *short, "--plan"])
    said = capsys.readouterr().out
    assert said.count("parameters") == 3 and "900 of 4 images, 90 epochs of 40" in said
    assert list(tmp_path.iterdir()) == []
    command.main([str(ROOT / "configs/finetune/dreambooth.yaml"), "data.params.instance_data_dir=a", "--plan"])
    assert "no plan: it tunes a model" in capsys.readouterr().out


MEASURED = """
import json, sys, time
from pathlib import Path
import torch
from benchmarks.common import process_memory, restart_peak
from ldm.training import loop, plan
from ldm.training.config import read_configs
from ldm.training.rehearsal import rehearse

*paths, changes = sys.argv[1:]
configs = read_configs(paths, json.loads(changes))
time.perf_counter = time.process_time  # the machine may be busy with other things
plans, own, times, begin = [], loop.training_batches, [], loop.train_stage
last = configs[-1]["name"]
rehearse(configs, False, torch.device("cpu"), lambda *a: a[0]["name"] == last and plans.append(plan.make_plan(*a)))
for config in configs:
    config["loop"]["steps"] = 2 if config is not configs[-1] else 20

def batches(*args):
    for number, batch in own(*args):
        times.append(time.process_time())
        if number == 2:
            restart_peak()
        peak.append(process_memory()["VmHWM"])
        yield number, batch

def stage(*args):
    base.append(process_memory()["VmRSS"])
    peak.clear(), times.clear()
    begin(*args)

base, peak = [], []
loop.training_batches, loop.train_stage = batches, stage
for config in configs:
    loop.train(config, device="cpu")
steps = sorted(b - a for a, b in zip(times[2:], times[3:]))
print(json.dumps([plans[-1].memory, peak[19] - base[-1], plans[-1].seconds, steps[len(steps) // 2]]))
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured as Linux has it")
@pytest.mark.parametrize("system", ["folder", "sklearn"])
def test_memory_and_time_of_a_training(system, tmp_path):
    """The autoencoder of configs/folder on images of noise, and the UNet of configs/sklearn with its first stages.

    glibc would keep what was freed, by its threshold of fresh mappings that grows; a fixed one shows what is in use.
    """
    names = ["autoencoder"] if system == "folder" else ["autoencoder", "clip", "diffusion"]
    changes = [f"outdir={tmp_path / 'out'}", "loop.report_to=none", "loop.preview_every=999", "loop.steps=999"]
    changes += ["loop.precision=fp32", "loop.save_every=999"]
    if system == "folder":
        for i in range(64):
            noise = np.random.default_rng(i).integers(0, 256, (80, 96, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / f"{i}.png")
        changes += [f"data.params.root={tmp_path}"]
    else:
        changes += ["loop.batch_size=128"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    paths = [ROOT / "configs" / system / f"{name}.yaml" for name in names]
    argv = [sys.executable, "-c", MEASURED, *paths, json.dumps(changes)]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=True, cwd=ROOT)
    memory, growth, seconds, took = json.loads(done.stdout.splitlines()[-1])
    assert memory == pytest.approx(growth, rel=0.15)
    assert seconds == pytest.approx(took, rel=0.15)
