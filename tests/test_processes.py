"""Training in several processes: the same as in one with the whole batch; and scripts that share out what they do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import refused, save_noise
from safetensors.torch import load_file
from test_pixel_diffusion import CONFIG, PIXEL, widened
from tiny_stages import STAGES as ALL
from tiny_stages import config_of, write_inputs

from ldm.commands import train as command
from ldm.training import loop, rehearsal
from ldm.training.fsdp import check_fsdp, use_fsdp
from ldm.training.processes import processes
from ldm.training.stage import Stage

ROOT = Path(__file__).parent.parent

# Of stages, besides those of tiny_stages: what is random in further ways.
NOISE = {"noise": {"offset": 0.1, "immiscible": True}, "timesteps": {"name": "logit_normal"}}
OPTIONS = {
    "diffusion": NOISE,
    "dreambooth": NOISE,
    "folder": {"caption_dropout": 0.5},
    "pixel": {"model": {**CONFIG, "params": {**PIXEL, **widened("self_condition")}}, "class_dropout": 0.5},
}

# Other images, which those stages measure that can be validated.
TEST, OTHERS = {"split": "test", "first": 12}, {"root": "class"}
VALIDATION = {"autoencoder": TEST, "clip": TEST, "diffusion": TEST, "pixel": TEST, "classifier": TEST}
VALIDATION |= {"noisy_classifier": TEST, "folder": OTHERS, "unconditional": OTHERS}

STAGES = [stage for stage in ALL if stage != "rows"]  # they need another package

# All but the main process fail when they write in the folder, and process 1 is killed after its first step by KILL=1.
RUN = """
import json, os, signal, sys
from ldm.program import run
from ldm.training import loop
rank, here = os.environ.get("RANK", "0"), os.getcwd()
def watch(event, arguments):
    writes = event in ("os.mkdir", "os.rename", "os.remove", "os.link") or event == "open" and arguments[2] & 3
    if writes and os.path.abspath(str(arguments[0])).startswith(here):
        os._exit(7)
def main():
    for config in json.loads(sys.argv[1]):
        loop.train(config, device="cpu", resume="--resume" in sys.argv)
if rank != "0":
    sys.addaudithook(watch)
if rank == os.environ.get("KILL"):
    loop.agreed = lambda *flags: os.kill(os.getpid(), signal.SIGKILL)
run(main)
"""

# Before it, in a process that has imported torch: it becomes two, in half the time that torchrun takes for that.
TWICE = """
import os, socket, sys
import accelerate, sklearn.datasets, torch._dynamo  # once: they take seconds
from ldm.training import autoencoder, diffusion, loop
torch.set_num_threads(1)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
children = []
for rank in "01":
    if (child := os.fork()) == 0:
        os.environ.update(place, RANK=rank, LOCAL_RANK=rank)
        break
    children.append(child)
else:
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.fixture
def images(tmp_path):
    save_noise(tmp_path)
    return tmp_path


def launch(count, script, *arguments, status=0, **options):
    """Run a script in `count` processes of one thread -> what they said."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    command = [sys.executable, *launcher, *map(str, (script, *arguments))]
    options["env"] = os.environ | {"OMP_NUM_THREADS": "1"} | options.get("env", {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, **options)
    assert done.returncode == status, done.stderr
    return done


def test_one_process_is_the_main_one():
    state = processes("cpu")
    assert state.is_main_process and state.num_processes == 1 and state.device.type == "cpu"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    (folder / "run.py").write_text(RUN)
    return folder


def configured(name, stages, validation=(), **loop):
    """Return configurations of stages of tiny_stages, with what is random of each, and SGD: Adam enlarges rounding."""
    configs = []
    for stage in stages:
        config = config_of(stage) | {"name": stage, "outdir": name}
        config["loop"] |= {"precision": "fp32", "ema": 0.0, "steps": 3} | loop
        config["stage"]["params"] |= {"optimizer": {"target": "torch.optim.SGD"}, **OPTIONS.get(stage, {})}
        if stage in validation:
            config["data"]["validation"] = validation[stage]
            config["loop"]["validate_every"] = 3
        configs.append(config)
    return json.dumps(configs)


def result(folder):
    """Return the weights of a run, in one vector, and its last metrics, of training and of validation."""
    weights = load_file(folder / "model.safetensors").values()
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    metrics = {name: value for line in lines for name, value in line.items()}
    return torch.cat([w.flatten().double() for w in weights]), metrics


def test_two_processes_are_one(inputs, warm_python, monkeypatch):
    """Of two optimizers, and of one, which uses all weights, so that DDP need not look for others, nor warn."""
    monkeypatch.chdir(inputs)
    stages, short = ("autoencoder", "classes"), {"preview_every": 9}
    for name, batch_size in (("short half", 1), ("short one", 2)):
        for config in json.loads(configured(name, stages, batch_size=batch_size, **short)):
            loop.train(config, device="cpu")
    done = warm_python(TWICE + RUN, configured("short two", stages, batch_size=1, **short), cwd=inputs)
    assert done.returncode == 0 and "find_unused_parameters" not in done.stderr, done.stderr
    for stage in stages:
        half, one, two = (result(inputs / f"short {name}" / stage) for name in ("half", "one", "two"))
        error, other = ((some[0] - one[0]).norm() for some in (two, half))
        assert error < 1e-3 * other, stage
        assert two[1]["grad_norm_0"] == pytest.approx(one[1]["grad_norm_0"], rel=1e-3)


@pytest.mark.parametrize("main", [True, False])
def test_the_main_process_alone_tries_the_stages(monkeypatch, main):
    done, state = [], SimpleNamespace(is_main_process=main, num_processes=2, device="cpu")
    monkeypatch.setattr("ldm.training.processes.processes", lambda device: state)
    monkeypatch.setattr(rehearsal, "rehearse", lambda configs, *others: done.append("tried"))
    monkeypatch.setattr(loop, "train", lambda config, *others: done.append(config["name"]))
    command.main([str(ROOT / "configs" / "sklearn" / "autoencoder.yaml")])
    assert done == ["tried"] * main + ["autoencoder"]


@pytest.mark.full
def test_two_processes_are_one_with_their_batches_together(inputs):
    """Every stage's weights, metrics and validation after three steps, up to rounding; half a batch differs."""
    for name, count, batch_size in (("half", 1, 1), ("one", 1, 2), ("two", 2, 1)):
        launch(count, "run.py", configured(name, STAGES, VALIDATION, batch_size=batch_size), cwd=inputs)
    for stage in STAGES:
        half, one, two = (result(inputs / name / stage) for name in ("half", "one", "two"))
        error, other = ((some[0] - one[0]).norm() for some in (two, half))
        assert error < (1e-2 if stage == "classifier" else 1e-3) * other, stage  # its batch norms have two numbers
        assert ("validation/loss" in two[1]) == (stage in VALIDATION)
        expected = one[1] | {"waits_for_data": two[1]["waits_for_data"]}
        assert two[1] == pytest.approx(expected, rel=1e-3, abs=1e-6), stage


@pytest.mark.full
def test_two_processes_make_one_cache(inputs):
    """An image is encoded by one of them, one shows the progress, and training is as from memory, to the bit."""
    ones = "from ldm import util\nfrom ldm.training import cache\ncache.SHARD, util.LOG_SECONDS = 4, 0\n"
    count = "import atexit, os\nown, made = cache.encode_batch, []\n"
    count += "cache.encode_batch = lambda net, images: (made.append(len(images)), own(net, images))[1]\n"
    count += "atexit.register(lambda: os.path.exists('cache') and open(f'made{rank}', 'w').write(str(sum(made))))\n"
    script = RUN.replace("    sys.addaudithook(watch)", "    pass").replace("def watch", ones + count + "def watch")
    (inputs / "cached.py").write_text(script)
    for name, cache in (("memory", None), ("disk", "cache")):
        configs = json.loads(configured(name, ("diffusion", "shards"), batch_size=1))
        for config in configs:
            config["stage"]["params"] |= {"cache_latents": True, "cache_dir": cache}
        done = launch(2, "cached.py", json.dumps(configs), cwd=inputs)
        assert done.stderr.count("encoding images:   0%") == 2  # one of each stage
    for stage in ("diffusion", "shards"):
        memory, disk = (result(inputs / name / stage)[0] for name in ("memory", "disk"))
        assert torch.equal(memory, disk), stage
    made = [int((inputs / f"made{rank}").read_text()) for rank in range(2)]
    assert sum(made) == 19


@pytest.mark.full
def test_a_killed_process_ends_the_others_and_the_run_goes_on_with_another_number(inputs):
    """One sentence, no result; then one process with the whole batch ends with the weights of one that did it all."""
    launch(1, "run.py", configured("alone", ["diffusion"], batch_size=2), cwd=inputs)
    given = {"cwd": inputs, "env": {"KILL": "1"}}
    done = launch(2, "run.py", configured("killed", ["diffusion"], batch_size=1, save_every=1), status=1, **given)
    assert done.stderr.count("error: another of the 2 processes has ended") == 1
    run = inputs / "killed" / "diffusion"
    assert (run / "config.yaml").exists() and not (run / "model.safetensors").exists()
    launch(2, "run.py", configured("killed", ["diffusion"], batch_size=1, steps=2), "--resume", cwd=inputs)
    assert torch.load(run / "resume.pt")["order"] == {"epoch": 0, "number": 2, "images": 4, "past": [(2, 2)]}
    (run / "model.safetensors").unlink()
    done = launch(1, "run.py", configured("killed", ["diffusion"], batch_size=2), "--resume", cwd=inputs)
    alone, resumed = result(inputs / "alone" / "diffusion"), result(run)
    assert (alone[0] - resumed[0]).norm() < 1e-5 * alone[0].norm() and "now take" not in done.stderr


FSDP = yaml.safe_load((ROOT / "docs" / "how-to" / "fsdp.yaml").read_text())["fsdp_config"]


@pytest.mark.full
def test_sharded_training_is_as_that_of_one_process(inputs):
    """FSDP's weights, average and checkpoint, resumed after the second step, by the variables of accelerate launch."""
    sharded = {"ACCELERATE_USE_FSDP": "true"} | {name.upper(): str(value) for name, value in FSDP.items()}
    given = {"cwd": inputs, "env": sharded}
    launch(1, "run.py", configured("complete", ["diffusion"], batch_size=2, ema=0.9), cwd=inputs)
    launch(2, "run.py", configured("sharded", ["diffusion"], batch_size=1, ema=0.9, steps=2), **given)
    launch(2, "run.py", configured("sharded", ["diffusion"], batch_size=1, ema=0.9), "--resume", **given)
    complete, found = (result(inputs / name / "diffusion") for name in ("complete", "sharded"))
    assert (complete[0] - found[0]).norm() < 1e-7 * complete[0].norm()
    assert found[1]["loss"] == pytest.approx(complete[1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("variables", "count", "said"),
    [
        ({}, 1, "this is one: start several"),
        ({"FSDP_VERSION": "1"}, 2, "fsdp_version: 2, fsdp_auto_wrap_policy: NO_WRAP"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, 2, "as in docs/how-to/fsdp.yaml"),
    ],
)
def test_refusals_of_fsdp(monkeypatch, variables, count, said):
    names = {"ACCELERATE_USE_FSDP": "true"} | {name.upper(): str(value) for name, value in FSDP.items()} | variables
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    refused(said, use_fsdp, SimpleNamespace(num_processes=count, state=SimpleNamespace()))
    refused("start Stage without it", check_fsdp, Stage(1), [None, None])


@pytest.mark.full
def test_dreambooth_in_two_processes(tiny_checkpoint, images):
    """Class images are generated once, five images are enough for two batches of four, and results are printed once."""
    given = {"ckpt": tiny_checkpoint, "instance_data_dir": images / "instance", "output_dir": images / "out"}
    given |= {"instance_prompt": "a sks five", "class_prompt": "a five", "num_class_images": 5, "train_batch_size": 4}
    given |= {"max_train_steps": 2, "num_validation_images": 1, "device": "cpu", "report_to": "none"}
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    done = launch(2, ROOT / "scripts" / "dreambooth.py", *options)
    assert done.stdout.count("model: ") == 1 and done.stderr.count("class images:   0%") == 1
    assert len(list((images / "out" / "class").iterdir())) == 5
    moved = [*options, "--output_dir", images / "third", "--resume_from_checkpoint", images / "out"]
    done = launch(2, ROOT / "scripts" / "dreambooth.py", *moved)
    copied = [(images / name / "model.safetensors").read_bytes() for name in ("out", "third")]
    assert copied[0] == copied[1]
