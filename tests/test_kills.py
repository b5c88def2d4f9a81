"""A run that is killed at any moment and resumed ends as if it had not been: the same files, bit for bit."""

import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stages import STAGES, config_of, write_inputs, write_rows

from ldm.training.loop import train

KILLS = 20


def run(config: Mapping[str, Any], folder: Path) -> None:
    """Train in a process of its own, which was forked from this one."""
    torch.set_num_threads(1)
    os.chdir(folder)
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        train(config, True, "cpu")


def start(config: Mapping[str, Any], folder: Path, inputs: Path) -> multiprocessing.Process:
    if not folder.exists():
        folder.mkdir()
        for path in inputs.iterdir():
            (folder / path.name).symlink_to(path)
    process = multiprocessing.get_context("fork").Process(target=run, args=(config, folder))
    process.start()
    return process


def results(folder: Path) -> dict[str, bytes]:
    """The files of a run but those that have times or paths in them."""
    paths = [path for path in (folder / "out").rglob("*") if path.is_file()]
    paths = [path for path in paths if path.name not in ("config.yaml", "resume.pt") and "tfevents" not in path.name]
    waits = re.compile(rb', "waits_for_data": [0-9.e-]+')  # a share of the time
    return {str(path.relative_to(folder)): waits.sub(b"", path.read_bytes()) for path in paths}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    write_rows(folder)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("name", STAGES)
def test_killed_runs_end_as_if_they_had_not_been(name, inputs, tmp_path):
    config = config_of(name)
    config["loop"] |= {"steps": 12, "save_every": 3, "preview_every": 4}
    if name == "dreambooth":  # its class images are generated too
        config["data"]["params"] |= {"class_data_dir": "generated", "default_class_images": 3}
    began = time.monotonic()
    process = start(config, tmp_path / "whole", inputs)
    process.join()
    assert process.exitcode == 0
    seconds, expected = time.monotonic() - began, results(tmp_path / "whole")
    assert f"out/{name}/model.safetensors" in expected
    moment, kills, number = random.Random(name), 0, 0
    while kills < KILLS:
        folder = tmp_path / f"killed{number}"
        process = start(config, folder, inputs)
        process.join(moment.uniform(0, seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        if process.exitcode == 0:
            assert results(folder) == expected
            number += 1
        else:
            assert process.exitcode < 0, "it failed, and was not killed"
    process = start(config, tmp_path / f"killed{number}", inputs)
    process.join()
    assert process.exitcode == 0 and results(tmp_path / f"killed{number}") == expected
