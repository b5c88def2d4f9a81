"""scripts/convert.py: precision, own settings, mistakes."""

import importlib.util
from pathlib import Path

import pytest
import torch

import ldm
from ldm.checkpoint.file import load_file

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert.py"


@pytest.fixture(scope="module")
def convert():
    spec = importlib.util.spec_from_file_location("convert", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_half_precision_rounds_each_weight_once_and_halves_the_file(convert, tiny_checkpoint, tmp_path):
    out = tmp_path / "half.safetensors"
    convert(
        [str(tiny_checkpoint), str(out), "--dtype", "fp16", "--default", "scale=1.25", "--default", "interval=[0.5, 4]"]
    )
    config, half = load_file(out)
    _, full = load_file(tiny_checkpoint)
    assert config["params"]["defaults"]["scale"] == 1.25 and config["params"]["defaults"]["interval"] == [0.5, 4]
    assert half.keys() == full.keys()
    assert all(torch.equal(half[name], full[name].half()) for name in full)
    assert out.stat().st_size < 0.65 * tiny_checkpoint.stat().st_size  # names and configuration do not shrink
    assert ldm.load(out, device="cpu").defaults["scale"] == 1.25


def test_mistakes_are_named_and_leave_the_output_alone(convert, tiny_checkpoint, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"kept")
    with pytest.raises(ValueError, match="'stepz=3' must be KEY=VALUE with a key of height"):
        convert([str(tiny_checkpoint), str(out), "--default", "stepz=3"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert([str(tmp_path / "none.safetensors"), str(out)])
    assert out.read_bytes() == b"kept"
