"""Training in several processes: the same as in one with the whole batch; and scripts that share out what they do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_noise
from safetensors.torch import load_file

from ldm.training.processes import processes

ROOT = Path(__file__).parent.parent

# Nothing drawn at random, of which each process has its own: an image decides its noise.
STEADY = """
import json, sys
import torch
from ldm.training import objective
from ldm.training.loop import train
torch.randn_like = torch.zeros_like
objective.training_timesteps = lambda batch, T, **settings: torch.full((batch,), T // 2)
objective.training_noise = lambda x0, **options: x0.flip(-1)
train(json.loads(sys.argv[1]), device="cpu")
"""


@pytest.fixture
def images(tmp_path):
    save_noise(tmp_path)
    return tmp_path


def launch(count, script, *arguments):
    """Run a script in `count` processes of one thread -> what they said."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    command = [sys.executable, *launcher, *map(str, (script, *arguments))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done


def test_one_process_is_the_main_one():
    state = processes("cpu")
    assert state.is_main_process and state.num_processes == 1 and state.device.type == "cpu"


@pytest.mark.full
def test_two_processes_are_one_with_their_batches_together(tiny_checkpoint, images):
    """DreamBooth's weights after four steps, up to rounding; half of the batch is something else."""
    (images / "run.py").write_text(STEADY)
    params = {"instance_data_dir": str(images / "instance"), "instance_prompt": "a sks five"}
    params |= {"class_data_dir": str(images / "class"), "class_prompt": "a five"}
    stage = {"ckpt": str(tiny_checkpoint), "resolution": 32, "learning_rate": 1e-3, "previews": ["a five"]}
    changes, before = [], load_file(tiny_checkpoint)
    for name, count, batch_size in (("two", 2, 2), ("one", 1, 4), ("half", 1, 2)):
        loop = {"steps": 4, "batch_size": batch_size, "ema": 0.9, "report_to": "none", "precision": "fp32"}
        config = {
            "name": name,
            "outdir": str(images),
            "seed": 1,
            "stage": {"target": "ldm.finetune.dreambooth.DreamBoothStage", "params": stage},
            "data": {"target": "ldm.inference.class_images.SubjectImages", "params": params},
            "loop": loop,
        }
        launch(count, images / "run.py", json.dumps(config))
        after = load_file(images / name / "model.safetensors")
        changes.append(torch.cat([(after[key] - before[key]).flatten() for key in before if key.startswith("model.")]))
    two, one, half = changes
    assert (two - one).norm() < 1e-3 * one.norm() < 0.01 * (half - one).norm()


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
