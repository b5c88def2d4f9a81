"""A ControlNet in its authors' terms (`outsiders`): it begins as the model itself, hears its control, and trains."""

import importlib
import sys
from pathlib import Path

import outsiders
import pytest
import torch
from compvis_models import a_batch, built, config, ours, randn, same, sampled
from conftest import refused
from golden_fill import fill
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config

PROMPTS = ["a photograph of a cat", "a red dog"]
T = torch.tensor([1, 700])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, values of order 1


@pytest.fixture(scope="module")
def model(clip):
    return built(config(clip))


@pytest.fixture(scope="module")
def twin(model):
    return ours(model)


def control_section(clip: Path) -> dict:
    section = config(clip, target="outsiders.ControlLDM")
    params = section["params"]
    unet = params["unet_config"]["params"]
    own = {name: unet[name] for name in ("image_size", "in_channels", "model_channels", "num_res_blocks")}
    own |= {name: unet[name] for name in ("attention_resolutions", "channel_mult", "num_heads", "context_dim")}
    control = {"target": "outsiders.ControlNet", "params": own | {"hint_channels": 3, "transformer_depth": 1}}
    params["unet_config"]["target"] = "outsiders.ControlledUnetModel"
    return section | {
        "params": params | {"control_stage_config": control, "control_key": "hint", "only_mid_control": False}
    }


@pytest.fixture
def controlled(clip, model) -> outsiders.ControlLDM:
    """As ControlNet's authors add a control to a checkpoint: its copies by name, the rest as it was made, strictly."""
    control = instantiate_from_config(control_section(clip))
    pretrained, scratch, target = model.state_dict(), control.state_dict(), {}
    new = []
    for name in scratch:
        source = "model.diffusion_" + name.removeprefix("control_") if name.startswith("control_") else name
        target[name] = pretrained.get(source, scratch[name]).clone()
        new += [] if source in pretrained else [name]
    assert new and all(".zero_convs." in n or "_hint_block." in n or ".middle_block_out." in n for n in new)
    control.load_state_dict(target, strict=True)
    return control.eval()


def hinted(n: int = 2) -> dict:
    return a_batch(n) | {
        "txt": PROMPTS[:n],
        "hint": torch.rand(n, 16, 16, 3, generator=torch.Generator().manual_seed(1)),
    }


@torch.no_grad()
def test_controlnet_begins_as_the_model_itself(controlled, twin):
    z, cond = controlled.get_input(hinted(), "jpg")
    context = cond["c_crossattn"][0]
    assert torch.equal(context, twin.condition(PROMPTS)["c_crossattn"])
    expected = twin.apply_model(z, T, {"c_crossattn": context})
    torch.testing.assert_close(controlled.apply_model(z, T, cond), expected, **CLOSE)
    torch.testing.assert_close(controlled.apply_model(z, T, cond | {"c_concat": None}), expected, **CLOSE)
    noise = randn(2, 4, 8, 8)
    loss, _ = controlled.p_losses(z, cond, T, noise=noise)
    torch.testing.assert_close(loss, twin.loss(z, {"c_crossattn": context}, T, noise).mean(), **CLOSE)


@torch.no_grad()
def test_controlnet_s_control_arrives(controlled, twin):
    """A control that is a constant in the middle is our UNet with that constant in its middle block."""
    z, cond = controlled.get_input(hinted(), "jpg")
    controlled.control_model.middle_block_out[0].bias.fill_(0.5)
    controlled.control_scales = [2.0] * 13
    hook = twin.model.diffusion_model.middle_block.register_forward_hook(lambda module, inputs, out: out + 2 * 0.5)
    expected = twin.apply_model(z, T, {"c_crossattn": cond["c_crossattn"][0]})
    hook.remove()
    found = controlled.apply_model(z, T, cond)
    torch.testing.assert_close(found, expected, **CLOSE)
    fill(controlled.control_model, 3)  # now the hint is read
    other = controlled.apply_model(z, T, cond | {"c_concat": [1 - cond["c_concat"][0]]})
    assert (controlled.apply_model(z, T, cond) - other).abs().max() > 1e-3


def test_controlnet_trains_its_control_alone(controlled):
    controlled.learning_rate = 1e-3
    optimizer = controlled.train().configure_optimizers()
    before = {name: p.detach().clone() for name, p in controlled.named_parameters()}
    controlled.training_step(hinted(), 0).backward()
    optimizer.step()
    changed = {name for name, p in controlled.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("control_model.") for name in changed)
    controlled.sd_locked = False
    out = controlled.model.diffusion_model.out[2].weight
    assert any(p is out for group in controlled.configure_optimizers().param_groups for p in group["params"])


def test_controlnet_logs_denoise_rows(controlled):
    log = controlled.log_images(hinted(), sample=True, ddim_steps=2, plot_denoise_rows=True)
    assert log["denoise_row"].shape == (3, 2 * 16, 3 * 16)  # two images; the start and two steps


def test_controlnet_logs_images(controlled, twin):
    torch.manual_seed(0)
    log = controlled.log_images(hinted(), N=2, ddim_steps=4, unconditional_guidance_scale=3.0)
    assert set(log) == {"reconstruction", "control", "conditioning", "samples_cfg_scale_3.00"}
    torch.manual_seed(0)
    controlled.get_input(hinted(), "jpg")  # draws the posterior's sample, as log_images did
    start = torch.randn(2, 4, 8, 8)
    cond, null = (twin.condition(prompts)["c_crossattn"] for prompts in (PROMPTS, [""] * 2))
    same(log["samples_cfg_scale_3.00"], twin.decode(sampled(twin, cond, null, start, 4, 3.0)))


CREATE_MODEL = """
from omegaconf import OmegaConf
from ldm.util import instantiate_from_config

def create_model(config_path):
    config = OmegaConf.load(config_path)
    return instantiate_from_config(config.model).cpu()
"""


@pytest.fixture
def cldm(tmp_path, monkeypatch) -> Path:
    """ControlNet's checkout: a folder `cldm` of modules, without `__init__.py`."""
    (tmp_path / "cldm").mkdir()
    (tmp_path / "cldm" / "model.py").write_text(CREATE_MODEL)
    (tmp_path / "cldm" / "cldm.py").write_text(Path(outsiders.__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "cldm"]:
        del sys.modules[name]


@torch.no_grad()
def test_controlnet_s_create_model(cldm, clip, model, twin):
    """The program imports `cldm.model` alone, and the yaml names classes of `cldm.cldm`."""
    section = control_section(clip)
    params = section["params"]
    for part in (section, params["unet_config"], params["control_stage_config"]):
        part["target"] = part["target"].replace("outsiders.", "cldm.cldm.")
    OmegaConf.save(OmegaConf.create({"model": section}), cldm / "cldm_v15.yaml")
    refused("target 'cldm.cldm.ControlLDM' is not an allowed class", instantiate_from_config, section)
    create_model = importlib.import_module("cldm.model").create_model
    control = create_model(cldm / "cldm_v15.yaml")
    assert type(control).__module__ == "cldm.cldm"
    control.load_state_dict(model.state_dict(), strict=False)
    z, cond = control.eval().get_input(hinted(), "jpg")
    expected = twin.apply_model(z, T, {"c_crossattn": twin.condition(PROMPTS)["c_crossattn"]})
    torch.testing.assert_close(control.apply_model(z, T, cond), expected, **CLOSE)
