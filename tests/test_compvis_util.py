"""CompVis's helpers under their old names: closed forms, goldens, and torch's own."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2
from ldm.models.diffusion.sampling_util import append_dims, norm_thresholding, spatial_norm_thresholding
from ldm.modules.attention import Normalize
from ldm.modules.diffusionmodules import util as layers
from ldm.modules.distributions.distributions import AbstractDistribution, DiracDistribution
from ldm.modules.ema import LitEma
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.compvis.main import Txt2ImgIterableBaseDataset
from ldm.models.autoencoder import IdentityFirstStage
from ldm.util import (  # fmt: skip
    autocast,
    count_params,
    default,
    exists,
    get_obj_from_str,
    instantiate_from_config,
    isimage,
    ismap,
    log_txt_as_img,
    mean_flat,
    parallel_data_prefetch,
)

GOLDEN = load_file(Path(__file__).parent / "golden" / "samplers.safetensors")


@pytest.mark.parametrize(
    "golden, arguments",
    [
        ("linear", ("linear", 1000, 0.00085, 0.012)),
        ("linear_ddpm", ("linear", 1000)),
        ("cosine", ("cosine", 1000)),
        ("cosine", ("squaredcos_cap_v2", 1000)),
        ("sqrt_linear", ("sqrt_linear", 1000)),
        ("sqrt", ("sqrt", 1000)),
    ],
)
def test_betas(golden, arguments):
    betas = layers.make_beta_schedule(*arguments)
    assert betas.dtype == np.float64 and np.abs(betas - GOLDEN[f"betas/{golden}"].numpy()).max() < 4e-16


def test_betas_of_a_curve_and_unknown_ones():
    s = 0.02
    ab = np.cos((np.arange(51) / 50 + s) / (1 + s) * np.pi / 2) ** 2
    wanted = np.clip(1 - ab[1:] / ab[:-1], 0, 0.999)
    assert np.allclose(layers.make_beta_schedule("cosine", 50, cosine_s=s), wanted, rtol=1e-12)
    assert layers.betas_for_alpha_bar(4, lambda u: 1 - u, 0.9).tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 0.9])
    refused("unknown schedule 'linaer'", layers.make_beta_schedule, "linaer", 10)


def test_ddim_parameters_of_arrays_and_tensors():
    ab = torch.cumprod(1 - GOLDEN["betas/linear"], 0)
    steps = layers.make_ddim_timesteps("uniform", num_ddim_timesteps=50, num_ddpm_timesteps=1000, verbose=False)
    for alphacums in (ab.numpy(), ab):
        sigmas, alphas, before = layers.make_ddim_sampling_parameters(
            alphacums=alphacums, ddim_timesteps=steps, eta=0.5, verbose=False
        )
        assert isinstance(sigmas, type(alphacums)) and isinstance(alphas, type(alphacums))
        for got, name in ((sigmas, "sigmas/50/eta0.5"), (alphas, "alphas/50"), (before, "alphas_prev/50")):
            assert np.allclose(np.asarray(got), GOLDEN[f"ddim_{name}"].numpy(), rtol=1e-12)


def test_tensor_helpers():
    table, x = torch.arange(10.0), torch.ones(3, 2, 4, 4)
    got = layers.extract_into_tensor(table, torch.tensor([7, 0, 2]), x.shape)
    assert got.shape == (3, 1, 1, 1) and got.flatten().tolist() == [7, 0, 2]
    torch.manual_seed(0)
    once = layers.noise_like((3, 2, 4), torch.device("cpu"), repeat=True)
    assert once.shape == (3, 2, 4) and torch.equal(once[0], once[2])
    torch.manual_seed(0)
    assert torch.equal(layers.noise_like((3, 2, 4), "cpu"), (torch.manual_seed(0), torch.randn(3, 2, 4))[1])
    assert torch.equal(mean_flat(torch.arange(8.0).view(2, 2, 2)), torch.tensor([1.5, 5.5]))
    loud = torch.full((2, 3, 4), 5.0) * torch.tensor([1, 0.01]).view(2, 1, 1)
    assert torch.allclose(norm_thresholding(loud, 2.0)[:, 0, 0], torch.tensor([2.0, 0.05]))
    x = torch.tensor([[3.0, 0.3], [4.0, 0.4]]).view(1, 2, 1, 2)  # two channels, two positions
    wanted = torch.tensor([[0.6, 0.3], [0.8, 0.4]]).view(1, 2, 1, 2) * torch.tensor([2**0.5, 1])
    assert torch.allclose(spatial_norm_thresholding(x, 1.0), wanted)
    assert append_dims(torch.ones(2), 4).shape == (2, 1, 1, 1)


def test_small_helpers():
    assert exists(0) and not exists(None)
    assert default(0, 1) == 0 and default(None, 1) == 1 and default(None, lambda: 2) == 2
    assert default(None, dict) is dict  # called only if it is a function, as in CompVis's
    four = [torch.zeros(1, c, 2, 2) for c in (1, 3, 4)]
    assert [isimage(x) for x in four] == [True, True, False] and [ismap(x) for x in four] == [False, False, True]
    assert not isimage("text") and not ismap(torch.zeros(4, 2, 2))
    assert count_params(nn.Linear(3, 4)) == 16


def test_count_params_prints(capsys):
    count_params(nn.Linear(1000, 1000), verbose=True)
    assert capsys.readouterr().out == "Linear has 1.00 M params.\n"


def test_autocast_is_for_cuda_alone():
    seen = autocast(lambda x: (torch.is_autocast_enabled("cuda"), x @ x))
    enabled, product = seen(torch.ones(2, 2))
    assert enabled == torch.cuda.is_available() and product.dtype == torch.float32


def test_text_as_images():
    images = log_txt_as_img((64, 32), ["a cat", "", "a much longer line that has to be broken"])
    assert images.shape == (3, 3, 32, 64) and images.min() >= -1 and images.max() == 1
    ink = (images < 0).any(1).sum((1, 2))
    assert ink[1] == 0 and 0 < ink[0] < ink[2]
    rows = (images[2] < 0).any(0).any(1).nonzero()
    assert rows.max() - rows.min() > 12  # more than one line of 10 pixels


def double(part):
    return [2 * x for x in part]


def test_prefetch():
    for n in (1, 3, 7):
        for processes in (True, False) if n == 3 else (False,):
            got = parallel_data_prefetch(double, list(range(5)), n, target_data_type="list", cpu_intensive=processes)
            assert got == [0, 2, 4, 6, 8]
    array = parallel_data_prefetch(lambda x, worker_id: np.array(x) * 10 + worker_id, np.arange(4), 2, "ndarray",
                                   cpu_intensive=False, use_worker_id=True)  # fmt: skip
    assert array.tolist() == [0, 10, 21, 31]


def test_layers():
    x = torch.randn(2, 64, 8, 8)
    assert Normalize(64).eps == 1e-6 and Normalize(64).num_groups == 32
    assert isinstance(layers.normalization(64), layers.GroupNorm32)
    assert layers.GroupNorm32(32, 64)(x.half()).dtype == torch.float16
    assert torch.equal(layers.SiLU()(x), nn.functional.silu(x))
    assert isinstance(layers.linear(3, 4, bias=False), nn.Linear)
    for dims, conv, pool in ((1, nn.Conv1d, nn.AvgPool1d), (2, nn.Conv2d, nn.AvgPool2d), (3, nn.Conv3d, nn.AvgPool3d)):
        made = layers.conv_nd(dims, 4, 8, 3, padding=1)
        assert type(made) is conv and made.weight.shape == (8, 4, *[3] * dims)
        assert type(layers.avg_pool_nd(dims, kernel_size=2, stride=2)) is pool
    assert not layers.zero_module(nn.Linear(2, 2)).weight.any()
    assert torch.equal(layers.scale_module(nn.BatchNorm2d(2), 3).weight, torch.tensor([3.0, 3.0]))
    made = layers.HybridConditioner({"target": "torch.nn.Identity"}, {"target": "torch.nn.Identity"})
    assert made(1, 2) == {"c_concat": [1], "c_crossattn": [2]}


def test_trivial_distribution_and_first_stage():
    assert DiracDistribution(3).sample() == DiracDistribution(3).mode() == 3
    with pytest.raises(NotImplementedError):
        AbstractDistribution().sample()
    stage, x = IdentityFirstStage(), torch.ones(1)
    assert stage.encode(x) is stage.decode(x) is stage.quantize(x) is stage(x) is x
    assert IdentityFirstStage(vq_interface=True).quantize(x) == (x, None, [None, None, None])


# Averaged weights


def test_ema_is_the_closed_form():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    net[1].requires_grad_(False)
    ema = LitEma(net, decay=0.5)
    assert ema.m_name2s_name == {"0.weight": "0weight", "0.bias": "0bias"}
    assert set(ema.state_dict()) == {"decay", "num_updates", "0weight", "0bias"} and ema.num_updates.dtype == torch.int
    shadow = net[0].weight.detach().clone()
    for n in range(1, 12):
        net[0].weight.data += 1
        ema(net)
        d = min(0.5, (1 + n) / (10 + n))
        shadow = d * shadow + (1 - d) * net[0].weight.detach()
    assert torch.allclose(ema.state_dict()["0weight"], shadow, atol=1e-5) and ema.num_updates == 11
    live = net[0].weight.detach().clone()
    ema.store(net.parameters())
    ema.copy_to(net)
    assert torch.allclose(net[0].weight, shadow, atol=1e-5)
    ema.restore(net.parameters())
    assert torch.equal(net[0].weight, live)
    ema.reset_num_updates()
    assert ema.num_updates == 0
    constant = LitEma(net, decay=0.25, use_num_upates=False)
    net[0].weight.data += 4
    constant(net)
    assert torch.allclose(constant.state_dict()["0weight"], live + 3) and constant.num_updates == -1
    refused("decay must be from 0 to 1", LitEma, net, decay=2)


# Learning rates


def test_warm_up_and_cosine():
    f = LambdaWarmUpCosineScheduler(warm_up_steps=10, lr_min=0.1, lr_max=1.0, lr_start=0.5, max_decay_steps=30)
    assert [f(0), f(5), f.schedule(10), f(20), f(30)] == pytest.approx([0.5, 0.75, 1.0, 0.55, 0.1])
    assert f(10**6) == pytest.approx(0.1)
    assert f(15) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))


def test_cycles():
    lists = {"f_min": [0.1, 0.0], "f_max": [1.0, 0.5], "f_start": [0.0, 0.2], "cycle_lengths": [10, 20]}
    f = LambdaWarmUpCosineScheduler2([2, 4], **lists)
    assert [f(1), f(2), f(6), f(10)] == pytest.approx([0.5, 1.0, 0.55, 0.1])  # step 10 is still of the first cycle
    assert [f(12), f(14), f(22), f(30)] == pytest.approx([0.35, 0.5, 0.25, 0.0])
    assert f(31) == f(10**9) == pytest.approx(0.0)  # CompVis crashes behind the last cycle
    g = LambdaLinearScheduler([2, 4], **lists)
    assert [g(1), g(2), g(5), g(10)] == pytest.approx([0.5, 0.1 + 0.9 * 0.8, 0.1 + 0.9 * 0.5, 0.1])
    assert [g(20), g(30), g(99)] == pytest.approx([0.25, 0.0, 0.0])


def test_stable_diffusion_s_schedule_in_torch():
    params = {"warm_up_steps": [10000], "cycle_lengths": [10000000000000]}
    params |= {"f_start": [1e-6], "f_max": [1.0], "f_min": [1.0]}
    config = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": params}
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = LambdaLR(optimizer, lr_lambda=instantiate_from_config(config).schedule)
    assert scheduler.get_last_lr() == [pytest.approx(1e-10)]
    optimizer.step()
    for _ in range(3):
        scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(1e-4 * (1e-6 + 3 * (1 - 1e-6) / 10000))]


# What configurations name of `main`


class Numbers(torch.utils.data.Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return i


def test_data_module():
    numbers = {"target": f"{__name__}.Numbers", "params": {"n": 10}}
    params = {"batch_size": 4, "num_workers": 0, "wrap": True, "train": numbers, "validation": numbers}
    module = instantiate_from_config({"target": "main.DataModuleFromConfig", "params": params})
    module.setup()
    assert [batch.tolist() for batch in module.val_dataloader()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    torch.manual_seed(0)
    order = [i for batch in module.train_dataloader() for i in batch.tolist()]
    assert sorted(order) == list(range(10)) != order
    assert get_obj_from_str("main.DataModuleFromConfig")(3).num_workers == 6

    class Endless(Txt2ImgIterableBaseDataset):
        def __iter__(self):
            yield from range(len(self))

    module.datasets["train"] = Endless(num_records=5, valid_ids=[1], size=64)
    assert [batch.tolist() for batch in module.train_dataloader()] == [[0, 1, 2, 3], [4]]
    assert module.datasets["train"].sample_ids == [1] and module.datasets["train"].size == 64


def test_image_logger(tmp_path):
    class Model(nn.Module):
        global_step, current_epoch = 0, 3

        def log_images(self, batch, split, scale):
            assert not self.training and split == "train"
            return {"samples": torch.full((6, 3, 8, 8), float(batch)), "inputs": torch.zeros(1, 3, 8, 8)}

    logger = get_obj_from_str("main.ImageLogger")(
        batch_frequency=5, max_images=4, increase_log_steps=False, log_images_kwargs={"scale": 1}, save_dir=tmp_path
    )
    model = Model()
    for step in range(11):
        model.global_step = step
        logger.log_img(model, 2.0, step)
    names = [f"{key}_gs-{gs:06}_e-000003_b-{gs:06}.png" for key in ("inputs", "samples") for gs in (5, 10)]
    assert sorted(p.name for p in (tmp_path / "images" / "train").iterdir()) == names and model.training
    with Image.open(tmp_path / "images" / "train" / names[2]) as grid:
        assert grid.size == (4 * 8 + 6, 8) and grid.getpixel((0, 0)) == (255, 255, 255)
    often = get_obj_from_str("main.ImageLogger")(batch_frequency=750, max_images=4)
    assert often.log_steps == {2**n for n in range(10)}
