"""The checkpoint file: exact, complete or not there, and every kind of damage named."""

import json
import sys

import pytest
import torch
from conftest import refused
from safetensors import safe_open
from safetensors.torch import save_file as save_plain
from torch import nn

from ldm.checkpoint import writing as module
from ldm.checkpoint.file import load_file
from ldm.checkpoint.writing import save_file

CONFIG = {"target": "torch.nn.Linear", "params": {"in_features": 3, "out_features": 2, "note": ["é", None, 1.5, True]}}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, generator=generator)
    return {"weight": weight, "bias": weight.T[0], "steps": torch.tensor(7), "half": torch.ones(2).half()}


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_is_exact(tmp_path):
    path = tmp_path / "deep" / "er" / "a.safetensors"  # folders are made
    save_file(path, tensors(), CONFIG)
    config, state = load_file(path)
    assert config == CONFIG and state.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype
    assert files(path.parent) == ["a.safetensors"]


def test_equal_models_are_equal_files(tmp_path):
    texts = {f"key {i}": f"text {i}" for i in range(10)}
    for name in "abcdef":
        state, metadata = (dict(sorted(d.items(), reverse=name > "c")) for d in (tensors(), texts))
        save_file(tmp_path / name, state, CONFIG, metadata=metadata)
    assert len({(tmp_path / name).read_bytes() for name in "abcdef"}) == 1


def test_other_programs_read_it(tmp_path):
    """The safetensors library as the judge of the file: every dtype, odd shapes, and the header's texts."""
    dtypes = {str(dtype): torch.arange(5).to(dtype) for dtype in module.SAFETENSORS_DTYPES}
    odd = {
        "scalar": torch.tensor(1.5),
        "none": torch.empty(0, 3),
        "transposed": torch.randn(3, 4).T,
        "é": torch.ones(1),
    }
    state = dtypes | odd | {"parameter": nn.Parameter(torch.randn(3)), "tied": odd["transposed"]}
    save_file(tmp_path / "a", state, CONFIG, metadata={"format": "pt", "note": "é\n"})
    with safe_open(tmp_path / "a", "pt") as file:
        texts = file.metadata()
        assert json.loads(texts.pop("ldm.config")) == CONFIG and texts == {"format": "pt", "note": "é\n"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].double(), tensor.double())
        assert found[name].data_ptr() % tensor.element_size() == 0
    save_file(tmp_path / "b", tensors())
    with safe_open(tmp_path / "b", "pt") as file:
        assert not file.metadata()


def test_what_safetensors_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="safetensors has no torch.complex64, the dtype of 'c'"):
        save_file(tmp_path / "a", {"a": torch.ones(1), "c": torch.ones(1, dtype=torch.complex64)})
    assert files(tmp_path) == []


def test_dtype_converts_floating_point_only(tmp_path):
    save_file(tmp_path / "a", tensors(), CONFIG, torch.float16)
    _, state = load_file(tmp_path / "a")
    assert torch.equal(state["weight"], tensors()["weight"].half())
    assert state["steps"].dtype == torch.int64 and state["half"].dtype == torch.float16


def test_missing_and_foreign_files(tmp_path):
    refused("'.*nowhere' does not exist", load_file, tmp_path / "nowhere", error=FileNotFoundError)
    refused(f"'{tmp_path}' is a folder", load_file, tmp_path)
    save_plain(tensors() | {"bias": torch.zeros(2)}, tmp_path / "plain")
    refused("'.*plain' carries no 'ldm.config'.* was not written by ldm", load_file, tmp_path / "plain")
    torch.save(tensors(), tmp_path / "zip")
    refused("'.*zip' carries no 'ldm.config'.* was not written by ldm", load_file, tmp_path / "zip")
    (tmp_path / "text").write_text("<!doctype html><p>Not found" * 20)
    refused("checkpoint '.*text' is a web page", load_file, tmp_path / "text")


@pytest.mark.parametrize("config", ["{", '"text"', "[1]", "null", "[" * 100_000], ids=range(5))
def test_damaged_configurations(tmp_path, config):
    save_plain({"a": torch.zeros(1)}, tmp_path / "a", {"ldm.config": config})
    refused("damaged configuration", load_file, tmp_path / "a")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_conversion_holds_one_tensor_at_a_time(warm_python, tmp_path):
    """64 MB in 1 MB tensors become 32 MB: memory grows by 1 to 4 MB, the allocator's ways included, not by 32."""
    code = f"""
import torch
from benchmarks.common import process_memory, restart_peak
from ldm.checkpoint.writing import save_file
state = {{str(i): torch.ones(250_000) for i in range(64)}}
save_file({str(tmp_path / "warm")!r}, {{"a": torch.ones(9)}}, dtype=torch.float16)
restart_peak()
before = process_memory()["VmHWM"]
save_file({str(tmp_path / "a")!r}, state, dtype=torch.float16)
print(process_memory()["VmHWM"] - before)
"""
    done = warm_python(code)
    assert int(done.stdout) < 10e6, done.stderr
    assert (tmp_path / "a").stat().st_size == pytest.approx(32e6, rel=0.01)
