"""Which classes a configuration may name, how mistakes in it are reported, and the choice of a device."""

import importlib
import io
import itertools
import sys

import pytest
import torch
from conftest import refused

from ldm import util
from ldm.program import Printable
from ldm.util import call_with, get_obj_from_str, instantiate_from_config, pick_device, pick_dtype

PACKAGE = """
from os import system
from pathlib import Path
from subprocess import Popen
import torch
from torch.nn import Linear
class MNIST(torch.utils.data.Dataset): pass
MNIST.__module__ = "torchvision.datasets.mnist"  # as if imported from there
class Net(torch.nn.Module):
    def __init__(self, width=3): super().__init__(); self.width = width
class Data(torch.utils.data.Dataset): pass
class Plain: pass
def make(): raise AssertionError("a function was reached")
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Research code beside the program: a package that nobody has imported yet."""
    (tmp_path / "some_research").mkdir()
    (tmp_path / "some_research" / "nets.py").write_text(PACKAGE)
    (tmp_path / "some_research" / "other.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield "some_research"
    for name in [name for name in sys.modules if name.partition(".")[0] == "some_research"]:
        del sys.modules[name]


REFUSED = """
os.system os.path.join posix.system builtins.eval builtins.exec builtins.open eval . subprocess.Popen subprocess.run
pathlib.Path importlib.import_module torch.load torch.hub.load torch.nn.Module torch.utils.data.TensorDataset
torch.utils.cpp_extension.load torchvision.datasets.MNIST torchvision.io.read_image pickle.Unpickler
torch.nn.modules.linear.Linear
ldm.util.Dataset ldm.util.nn.Linear ldm.util.sys.modules ldm.checkpoint.file.Path ldm.loading.Path ldm.loading.load
ldm.util.instantiate_from_config ldm.images.to_pil ldm.models.unet.NoSuchClass ldm.no_such_module.Class ldm.models.unet
no_such_package_at_all.Class
""".split()  # of torch only the listed names; nothing that one of our modules merely imports


@pytest.mark.parametrize("target", [*REFUSED, "", None, 5])
def test_refused(target):
    refused("^target ", get_obj_from_str, target)


@pytest.mark.parametrize("target", ["ldm.models.unet.UNetModel", "ldm.data.digits.Digits", "torch.nn.Linear"])
def test_allowed(target):
    module, _, name = target.rpartition(".")
    assert get_obj_from_str(target) is getattr(importlib.import_module(module), name)


def test_optimizers_and_transforms_are_allowed():
    assert get_obj_from_str("torch.optim.AdamW") is torch.optim.AdamW
    assert "torchvision.transforms.Resize" in util.ALLOWED


def test_a_package_is_allowed_once_the_program_has_imported_it(package):
    refused("the program has imported, .* LDM_ALLOW=some_research", get_obj_from_str, "some_research.nets.Net")
    assert "some_research" not in sys.modules  # refusing imports nothing
    importlib.import_module("some_research.other")  # of its own, one module is enough
    net = instantiate_from_config({"target": "some_research.nets.Net", "params": {"width": 7}})
    assert net.width == 7
    assert get_obj_from_str("some_research.nets.Data").__name__ == "Data"
    for name in ("Plain", "make", "Path", "MNIST"):
        with pytest.raises(ValueError, match="neither a torch Module nor a Dataset|not a class|not defined in"):
            get_obj_from_str(f"some_research.nets.{name}")


def test_an_installed_package_is_not_allowed_by_importing_it(tmp_path, package, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "some_research").rename(tmp_path / "site-packages" / "some_research")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    importlib.import_module("some_research.nets")
    refused("not an allowed class: .*--allow some_research", get_obj_from_str, "some_research.nets.Net")
    monkeypatch.setenv("LDM_ALLOW", "some_research")
    assert get_obj_from_str("some_research.nets.Net").__name__ == "Net"


def test_a_single_module_of_the_program_is_its_own(tmp_path, monkeypatch):
    (tmp_path / "some_nets.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    refused("not an allowed class", get_obj_from_str, "some_nets.Net")
    importlib.import_module("some_nets")
    assert get_obj_from_str("some_nets.Net").__name__ == "Net"
    refused("not defined in some_nets", get_obj_from_str, "some_nets.Linear")
    del sys.modules["some_nets"]


def test_a_stranger_s_configuration_reaches_nothing_through_a_package_of_the_program(package, tmp_path):
    importlib.import_module("some_research.other")
    import xml  # a package of Python's own, imported; as torch is, and numpy

    assert xml.__path__
    through = "torch.hub.load make system Popen Path MNIST Linear __class__".split()
    reached = [f"some_research.nets.{name}" for name in through]
    reached += [f"some_research.{name}" for name in ("os.system", "evil.Net", ".nets.Net", "__path__")]
    others = "xml.dom.minidom.Document torch.hub.load torch.distributed.run.run torch.jit.load numpy.load os.system "
    others += "numpy.ctypeslib.load_library subprocess.Popen unittest.mock.Mock pytest.main"
    for target in [*reached, *others.split()]:
        refused("^target ", instantiate_from_config, {"target": target, "params": {"command": f"touch {tmp_path}/hit"}})
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_package_is_allowed_that_the_user_names(package, monkeypatch, how):
    monkeypatch.setattr(util, "ALLOWED_PACKAGES", {"some_research"} if how == "option" else set())
    monkeypatch.setenv("LDM_ALLOW", "" if how == "option" else "another,some_research")
    assert get_obj_from_str("some_research.nets.Net").__name__ == "Net"
    refused("neither a torch Module nor a Dataset", get_obj_from_str, "some_research.nets.Plain")
    refused("not an allowed class", get_obj_from_str, "some_research2.nets.Net")


def test_parameters_that_a_class_does_not_take_are_named():
    linear = {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 3}}
    assert instantiate_from_config(linear).weight.shape == (3, 2)
    assert instantiate_from_config(linear, bias=False).bias is None
    with pytest.raises(
        ValueError, match="torch.nn.Linear.*'out_feature'; did you mean out_features\\?; it takes .*'out_features'"
    ):
        instantiate_from_config({"target": "torch.nn.Linear", "params": {"in_features": 2, "out_feature": 3}})
    refused("torch.nn.Linear: missing .*'in_features'", instantiate_from_config, {"target": "torch.nn.Linear"})
    with pytest.raises(ValueError, match="torch.nn.Linear: .*str"):  # of the wrong kind
        instantiate_from_config({"target": "torch.nn.Linear", "params": {"in_features": "two", "out_features": 3}})


def test_a_configurations_part_is_given_beside_what_is_the_callers_own():
    def function(a, b=2, *, c=3):
        return a, b + 0, c

    assert call_with("part", function, {"b": 5}, a=1) == (1, 5, 3)
    for params, message in (
        ({"d": 1}, r"^part: got an unexpected keyword argument 'd'; it takes \['b', 'c'\]$"),
        ({"a": 1}, r"^part: got an unexpected keyword argument 'a'; it takes \['b', 'c'\]$"),  # not from there
        ({"b": "x"}, "^part: .*concatenate"),
        ("b", r"^part: 'b' is not a mapping; it takes \['b', 'c'\]$"),
    ):
        refused(message, call_with, "part", function, params, a=1)
    refused(r"^part: missing a required argument: 'a'; it takes \['a', 'b', 'c'\]$", call_with, "part", function, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_res_blocks": 10**6},
            "UNetModel: num_res_blocks 1000000 must be an integer from 1 to 1024 or a list",
        ),
        ({"norm_groups": 0}, "norm_groups 0 must be an integer from 1"),
        ({"dropout": float("nan")}, "dropout nan must be a number from 0 to 1"),
        ({"in_channels": "x" * 1000}, f"in_channels '{'x' * 99} ... {'x' * 49}' must be an integer"),
        ({"channel_mult": [1, None]}, "channel_mult .* must be a list, each an integer"),
        ({"num_head_channels": 0}, "num_head_channels 0 must be -1 or an integer from 1"),
        ({"use_checkpoint": "yes"}, "use_checkpoint 'yes' must be true or false"),
        ({"num_clases": 3}, "'num_clases'; did you mean num_classes\\?"),
        ([], "UNetModel: .. is not a mapping"),
    ],
)
def test_a_value_that_does_not_fit_its_type_hint_is_named(change, message):
    from conftest import TINY

    config = TINY["unet_config"]
    refused(message, instantiate_from_config, {**config, "params": change and {**config["params"], **change}})


def test_construction_stops_above_a_number_of_tensors():
    from torch import nn

    with util.at_most(tensors=4, numbers=100):
        nn.Linear(3, 4), nn.Linear(3, 4)
        refused("more than 4 tensors", nn.Linear, 3, 4)
    with util.at_most(tensors=4, numbers=100):
        refused("more than 100 numbers", nn.Linear, 10, 11)
    nn.Linear(10, 11), nn.Linear(10, 11), nn.Linear(10, 11)


def test_a_parameter_of_a_parameter_is_named():
    from conftest import TINY

    config = TINY["first_stage_config"]
    ddconfig = {**config["params"]["ddconfig"], "chh": 8}
    with pytest.raises(ValueError, match="AutoencoderKL: .*'chh'"):
        instantiate_from_config({**config, "params": {"embed_dim": 4, "ddconfig": ddconfig}})


def test_compvis_marks_and_missing_target():
    assert instantiate_from_config("__is_first_stage__") is None
    assert instantiate_from_config("__is_unconditional__") is None
    for config in ({"params": {}}, "UNetModel", None, 5, []):
        refused("names no class to build: it must be a mapping with a `target`", instantiate_from_config, config)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_in_a_log_is_a_line_now_and_then(monkeypatch, terminal):
    """And nothing of one that would vanish, unless it lasts. The clock is 1 s further at each look of tqdm's."""
    log = io.StringIO()
    log.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", Printable(log))  # as a command has it
    monkeypatch.setattr(sys, "__stderr__", log)
    monkeypatch.setattr("tqdm.std.time", itertools.count().__next__)
    for _ in util.progress_bar(range(5), desc="soon gone"):
        pass
    for _ in util.progress_bar(range(200), leave=True, desc="training"):
        pass
    assert ("soon gone" in log.getvalue()) == terminal == ("\r" in log.getvalue())
    lines = log.getvalue().splitlines()
    if not terminal:
        assert all(line.startswith("training: ") for line in lines) and 5 <= len(lines) <= 15
        assert lines[-1].startswith("training: 100%")
    else:
        assert log.getvalue().count("training") > 20


@pytest.mark.parametrize(("rank", "disable", "shown"), [("0", False, True), ("0", True, False), ("1", False, False)])
def test_a_bar_is_of_the_first_process(monkeypatch, rank, disable, shown):
    monkeypatch.setenv("RANK", rank)
    with util.progress_bar(total=1, disable=disable) as bar:
        assert bar.disable != shown


def test_pick_dtype():
    half = (torch.float16, "fp16", "float16", "half", "torch.float16")
    assert {pick_dtype(dtype) for dtype in half} == {torch.float16} and pick_dtype(None) is None
    for wrong in ("int8", torch.int8, "Tensor", "fp8", float, 16):
        refused("is not one of floats: use fp32, fp16, bf16, or torch.float16, say", pick_dtype, wrong)


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device() == pick_device("auto") == torch.device(expected)
    for name in ("gpu", "", "cuda:99", "tpu"):
        refused(f"device '{name}' is not available here: use auto", pick_device, name)
