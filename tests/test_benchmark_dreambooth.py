"""benchmarks/dreambooth.py: both sides run on a tiny model of Stable Diffusion 1's kind; the table."""

import json

import pytest
from PIL import Image
from script_runs import run_program
from tiny_stable_diffusion import SD1

import ldm
from benchmarks import dreambooth as benchmark
from ldm.latent_diffusion import LatentDiffusion


def test_the_table():
    """Ours over the peer's, from CPU seconds and peaks; what was not measured is a dash."""
    row = {"row": "full", "seconds": 9.0, "cpu_seconds": 3.0, "peak_GiB": 8.0}
    rows = [row | {"who": "ldm"}, row | {"who": "diffusers", "cpu_seconds": 4.0, "peak_GiB": 16.0}]
    table = benchmark.table([*rows, row | {"row": "adafactor", "who": "ldm"}]).splitlines()
    assert table[2] == "| full | 9.00 (3.00) | 9.00 (4.00) | 0.75 | 8.00 | 16.00 | 0.50 |"
    assert table[3] == "| adafactor | 9.00 (3.00) | - | - | 8.00 | - | - |"


@pytest.mark.full
def test_both_sides_run(warm_python, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 32), (10 * i, 200, 30)).save(tmp_path / "images" / f"{i}.png")
    ldm.save(LatentDiffusion(**SD1), tmp_path / "tiny.safetensors")
    out, rows = tmp_path / "cost.jsonl", ["lora, checkpointing", "adafactor", "full"]
    options = ["--images", tmp_path / "images", "--ckpt", tmp_path / "tiny.safetensors", "--rows", *rows]
    options += ["--resolution", 32, "--steps", 2, "--out", out]
    done = run_program(warm_python, "../benchmarks/dreambooth", *options)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["row"], row["who"]) for row in found] == [
        ("lora, checkpointing", "ldm"),
        ("lora, checkpointing", "diffusers"),
        ("adafactor", "ldm"),
        ("full", "ldm"),
        ("full", "diffusers"),
    ]
    assert all(0 < row["cpu_seconds"] and 0.1 < row["peak_GiB"] < 3 for row in found)
