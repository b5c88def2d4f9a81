"""Memory layout, torch.compile and compiled files change nothing but the order of sums."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused
from torch.utils.flop_counter import FlopCounterMode

import ldm
from ldm.inference import ahead_of_time, precision, widened
from ldm.inference.compile import channels_last, compile_unet
from ldm.inference.precision import set_precision
from ldm.latent_diffusion import DiffusionWrapper


def network(model, b: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, 4, 8, 8, generator=generator)
    with torch.inference_mode():
        return model.apply_model(x, torch.full((b,), 500.0), model.condition(["a one"] * b))


def test_channels_last(model):
    expected, latents = network(model), torch.randn(1, 4, 8, 8)
    pixels = model.decode(latents)
    channels_last(model)
    for weight in (
        model.model.diffusion_model.out[2].weight,
        model.first_stage_model.encoder.down[0].block[0].conv1.weight,
    ):
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    # float32 sums of a few hundred products of order 1; measured: 1e-6
    torch.testing.assert_close(network(model), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(latents), pixels, atol=1e-5, rtol=0)


class Network(torch.nn.Module):
    """In place of a UNet, because tracing one takes 20 seconds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, timesteps, context=None, y=None):
        if y is not None:
            raise ValueError("it takes no y")
        return self.conv(x).sin() + timesteps[:, None, None, None]


def ones() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(1, 4, 8, 8), torch.ones(1)


def small() -> tuple[SimpleNamespace, DiffusionWrapper]:
    model = SimpleNamespace(model=DiffusionWrapper(Network()))
    return model, model.model


def test_compiling_is_announced_once_for_each_shape_of_many(capfd):
    """Twelve, of which torch by itself compiles eight."""
    model, unet = small()
    batches = [2, 1, *range(3, 13)]
    inputs = [(torch.randn(b, 4, 8, 8), torch.zeros(b)) for b in batches]
    expected, traced = [unet(*pair) for pair in inputs], []

    def backend(graph, inputs):  # computes as before
        traced.append([x.shape[0] for x in inputs if x.shape[1:] == (4, 8, 8)])
        return graph.forward

    compile_unet(model, backend)
    for _ in range(2):
        assert all(torch.equal(unet(x, t, c_adm=None), out) for (x, t), out in zip(inputs, expected, strict=True))
    assert traced == [[b] for b in batches]
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [f"compiling the UNet for an input of {b} x 4 x 8 x 8 ..." for b in batches]


def test_a_compiler_that_fails_is_one_sentence():
    def backend(graph, inputs):
        raise RuntimeError("cannot find g++\nand many lines more")

    model, unet = small()
    compile_unet(model, backend)
    refused(r"^torch.compile failed \(.*cannot find g\+\+\): .* leave --compile out$", unet, *ones())


def test_what_torch_leaves_uncompiled_is_refused():
    model, unet = small()
    compile_unet(model, backend="eager")
    unet(*ones())
    with torch.compiler.set_stance("force_eager"):
        refused("torch computed Network uncompiled, as it does for TORCH_COMPILE_DISABLE=1", unet, *ones())
    with FlopCounterMode(display=False):
        refused("torch computed Network uncompiled, .*a dispatch mode", unet, *ones())
    unet(*ones())


def test_mistakes_of_the_caller_stay_what_they_are():
    model, unet = small()
    compile_unet(model, backend="eager")
    refused("^it takes no y$", unet, *ones(), c_adm=torch.zeros(1))
    unet(*ones())  # compiled nevertheless, or it would be a ValueError


@pytest.fixture
def files(monkeypatch, tmp_path):
    """The folder of compiled files, which the test has for itself; kernels are not chosen by trial, to be quicker."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ahead_of_time, "INDUCTOR", {"freezing": True})
    return tmp_path / "ldm" / "compiled"


def compiled_small() -> tuple[DiffusionWrapper, Network]:
    model, unet = small()
    unet.eval()
    compile_unet(model)
    return unet, unet.diffusion_model


@pytest.mark.full
def test_a_compiled_file_serves_until_something_changes(files, capfd):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 3.0])
    unet, network = compiled_small()

    def compiles() -> bool:
        with torch.no_grad():
            expected = network._call_impl(x, t)
            torch.testing.assert_close(unet(x, t), expected, atol=1e-5, rtol=1e-5)
        return "compiling the UNet for an input of 2 x 4 x 8 x 8 (a minute or two" in capfd.readouterr().err

    assert [compiles(), compiles()] == [True, False]
    x = x.transpose(2, 3)  # the same shape in another order in memory
    assert not compiles()
    with torch.no_grad():
        network.conv.weight.mul_(2)
    assert [compiles(), compiles()] == [True, False]
    network.conv.weight.data = network.conv.weight.data / 2
    assert not compiles()  # these weights have a file
    unet, network = compiled_small()  # as in another process
    assert not compiles()
    for file in files.iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    unet, network = compiled_small()
    assert compiles()
    assert len(list(files.iterdir())) == 2


ALONE = """
import sys, torch
from test_compile import ahead_of_time, compiled_small, ones

torch.set_num_threads(int(sys.argv[1]))
ahead_of_time.INDUCTOR = {"freezing": True}
with torch.no_grad():
    unet, network = compiled_small()
    torch.testing.assert_close(unet(*ones()), network._call_impl(*ones()))
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
"""


@pytest.mark.full
def test_another_process_runs_the_files_without_the_compiler(files):
    with torch.no_grad():
        compiled_small()[0](*ones())
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", ALONE, str(torch.get_num_threads())]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.stderr == ""  # nothing was compiled
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14):  # torch 2.6 loads it by the compiler's module
        assert run.stdout == "[]\n"


@pytest.mark.full
def test_a_network_that_gives_zero_compiles(files):
    """As an untrained UNet, whose last convolution is zero."""
    unet, network = compiled_small()
    with torch.no_grad():
        network.conv.weight.zero_()
        network.conv.bias.zero_()
        assert torch.equal(unet(torch.ones(1, 4, 8, 8), torch.zeros(1)), torch.zeros(1, 4, 8, 8))
    assert len(list(files.iterdir())) == 1


@pytest.mark.full
def test_what_compiled_to_something_else_is_refused(files, monkeypatch):
    monkeypatch.setattr(ahead_of_time, "ROUNDING", {torch.float32: -1.0})
    with torch.no_grad():
        refused(r"torch.compile failed \(what it made is off by \S+\)", compiled_small()[0], *ones())
    assert list(files.iterdir()) == []


@pytest.mark.full
def test_gradients_pass_a_network_with_compiled_files(files):
    unet, network = compiled_small()
    x, t = ones()
    unet(x.requires_grad_(), t).sum().backward()
    assert x.grad is not None and network.conv.weight.grad is not None
    assert not files.exists()


def test_a_file_is_for_what_the_code_follows_from(monkeypatch):
    asked = ([0, 1], [(torch.Size([1, 4, 8, 8]), torch.float32)], "auto")
    first, second = Network().eval(), Network().eval()

    def digest(network, asked=asked):
        return ahead_of_time.digest(network, list(network.parameters()), asked)

    same = digest(first)
    assert digest(second) == same
    assert digest(first, ([0, 1], [(torch.Size([2, 4, 8, 8]), torch.float32)], "auto")) != same
    with torch.no_grad():
        second.conv.bias[0] += 1e-6
    assert digest(second) != same
    first.conv.padding = (0, 0)  # a setting that no weight shows
    assert digest(first) != same
    first.conv.padding = (1, 1)
    assert digest(first) == same
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert digest(first) != same
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(torch, "__version__", "0")
    assert digest(first) != same


def test_large_networks_and_other_backends_have_no_files(monkeypatch):
    def called(*args, **kwargs):
        raise AssertionError("compiled ahead")

    monkeypatch.setattr(ahead_of_time, "_load", called)
    model, unet = small()
    compile_unet(model, backend="eager")
    with torch.no_grad():
        unet.eval()(*ones())
    monkeypatch.setattr(ahead_of_time, "MOST_WEIGHTS", 10)
    network = model.model.diffusion_model
    before = network._compiled_call_impl
    ahead_of_time.compile_ahead(network, "--compile", "UNet")
    assert network._compiled_call_impl is before


@pytest.mark.full
def test_inductor_generates_the_same_digit(files):
    model = ldm.load(device="cpu")
    settings = {"steps": 4, "interval": (0, 100)}  # one shape
    expected = np.asarray(model.generate(["a handwritten digit five"], **settings)[0]).astype(int)
    compile_unet(model)
    found = np.asarray(model.generate(["a handwritten digit five"], **settings)[0])
    assert np.abs(found - expected).max() <= 1


@pytest.mark.full
def test_half_precision_weights_that_wait_are_compiled_in_one_graph(model, monkeypatch):
    graphs = []

    def backend(graph, inputs):  # computes as before
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(precision, "MANY", 0)
    monkeypatch.setattr(widened, "LARGE", 300)
    wide = copy.deepcopy(model.half()).float()
    set_precision(model, "full", as_stored=True, traced=True)
    assert torch.float16 in {p.dtype for p in model.model.parameters()}
    with compile_unet(model, backend):
        for name in ("full", "bf16"):
            set_precision(model, name)
            set_precision(wide, name)
            assert torch.equal(network(model), network(wide))
    assert len(graphs) == 2


@pytest.mark.full
def test_inductor_without_a_compiler(model, monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compile_unet(model)
    broken = {"cpp.cxx": (None, "/nonexistent"), "fx_graph_cache": False}
    with config.patch(broken):  # what pytest sets is hidden from then on
        refused(r"torch.compile failed \(.*No working C\+\+ compiler.*leave --compile out", network, model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    model = ldm.load(device="cuda")
    expected = np.asarray(model.generate(["a handwritten digit five"], steps=4)[0]).astype(int)
    channels_last(model)
    compile_unet(model)
    found = np.asarray(model.generate(["a handwritten digit five"], steps=4)[0])
    assert np.abs(found - expected).max() <= 2


def test_a_copy_is_uncompiled(capfd):
    model, unet = small()
    compile_unet(model, backend="eager")
    x, t = ones()
    expected = unet(x, t)
    assert "compiling" in capfd.readouterr().err
    for copied in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        torch.testing.assert_close(copied(torch.cat([x, x]), torch.ones(2))[:1], expected)
    assert "compiling" not in capfd.readouterr().err
