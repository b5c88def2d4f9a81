"""Bands give what the whole image gives; what they cost in memory is bounded by the band."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import randomised, refused
from test_pixel_diffusion import build

import ldm
from ldm.images import to_uint8
from ldm.inference.tiling import slice_vae, tile_vae
from ldm.models.autoencoder import AutoencoderKL

DDCONFIG = {
    "double_z": True, "z_channels": 3, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 8, "ch_mult": [1, 2, 2],
    "num_res_blocks": 2, "attn_resolutions": [], "norm_groups": 4,
}  # fmt: skip
KINDS = {
    "plain": {},
    "attention": {"attn_resolutions": [16]},  # in the middle level, too
    "pooling": {"resamp_with_conv": False},
    "tanh": {"tanh_out": True, "attn_type": "none"},
    "patches": {"patch": 2, "ch_mult": [1, 2]},
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_like(b: int, height: int, width: int) -> torch.Tensor:
    """Pixels (b, 3, height, width) that differ between top and bottom, as images do and noise does not."""
    ramp = torch.linspace(-1, 1, height).view(1, 1, -1, 1)
    return (ramp + 0.3 * ramp * random(b, 3, height, width)).clamp(-1, 1)


def model_with(**kind) -> SimpleNamespace:
    torch.manual_seed(0)
    first_stage = randomised(AutoencoderKL({**DDCONFIG, **kind}, embed_dim=4)).eval().requires_grad_(False)
    return SimpleNamespace(first_stage_model=first_stage, downsampling=4)


def rows_seen(module: torch.nn.Module) -> list[int]:
    """Grows by the height of the module's input at each call."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[2]))
    return rows


@pytest.mark.parametrize(
    "kind, height, width, side",
    [
        ("plain", 64, 40, 16),
        ("plain", 80, 16, 20),
        ("attention", 52, 48, 8),  # one row of latents in a band
        ("pooling", 36, 24, 16),  # the last band is smaller
        ("tanh", 52, 16, 16),
        ("patches", 64, 40, 16),
    ],
)
@torch.inference_mode()
def test_bands_equal_the_whole(kind, height, width, side):
    model = model_with(**KINDS[kind])
    vae = model.first_stage_model.double()  # in which a wrong row, or a wrong statistic, cannot pass for rounding
    images = image_like(2, height, width)
    posterior = vae.encode(images)
    pixels = vae.decode(posterior.mean)
    tile_vae(model, side)
    decoded, encoded = rows_seen(vae.decoder.up[0].block[0].conv1), rows_seen(vae.encoder.down[0].block[0].conv1)
    bands = vae.encode(images)
    torch.testing.assert_close(bands.mean, posterior.mean, atol=1e-11, rtol=0)
    torch.testing.assert_close(bands.logvar, posterior.logvar, atol=1e-11, rtol=0)
    torch.testing.assert_close(vae.decode(posterior.mean), pixels, atol=1e-11, rtol=0)
    assert pixels.std() > 0.01 and posterior.mean.std() > 0.01
    for seen in (encoded, decoded):
        assert len(seen) > 4 and max(seen) <= max(4, side * side // width) + 2  # the band and one row of each neighbour


@torch.inference_mode()
def test_tiles_decoded_apart_differ():
    """What the bands are for: without common statistics the halves of an image do not fit."""
    model = model_with()
    vae = model.first_stage_model
    z = vae.encode(image_like(1, 64, 32)).mean
    pixels = vae.decode(z)
    upper = vae.decode(z[:, :, :12])[:, :, :32]  # with a third of overlap
    assert (upper - pixels[:, :, :32]).abs()[:, :, :8].max() > 0.1 * pixels.std()  # and far from the cut, too


@torch.inference_mode()
def test_small_images_and_odd_sizes_are_computed_whole_one_at_a_time():
    model = model_with()
    vae = model.first_stage_model
    small, odd = image_like(3, 32, 32), image_like(2, 37, 50)
    expected = [vae.encode(x).mean for x in (small, odd)]
    for prepare in (slice_vae, lambda model: tile_vae(model, 32)):
        prepare(model)
        sizes: list[torch.Size] = []
        hook = vae.encoder.conv_in.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))  # noqa: B023
        for x, latents in zip((small, odd), expected, strict=True):
            torch.testing.assert_close(vae.encode(x).mean, latents, atol=1e-5, rtol=0)
        hook.remove()
        assert sizes == [(1, 3, 32, 32)] * 3 + [(1, 3, 37, 50)] * 2
        pixels = vae.decode(expected[0])
        torch.testing.assert_close(pixels, torch.cat([vae.decode(z) for z in expected[0].split(1)]), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_half_precision_bands_are_no_worse_than_the_whole():
    model = model_with()
    vae = model.first_stage_model
    z = random(1, 4, 16, 10)
    exact = vae.decode(z)
    vae.bfloat16()
    whole = (vae.decode(z).float() - exact).abs().mean()
    tile_vae(model, 16)
    bands = vae.decode(z)
    assert bands.dtype == torch.bfloat16
    assert 0 < (bands.float() - exact).abs().mean() < 1.5 * whole


@torch.inference_mode()
def test_a_copy_of_the_model_uses_its_own_weights():
    model = model_with()
    tile_vae(model, 16)
    other = copy.deepcopy(model)
    z = random(1, 4, 16, 10)
    before = model.first_stage_model.decode(z)
    other.first_stage_model.decoder.conv_out.weight.zero_()
    assert torch.equal(model.first_stage_model.decode(z), before)
    assert not torch.equal(other.first_stage_model.decode(z), before)


@torch.inference_mode()
def test_the_digits_model_at_many_times_its_size():
    model = ldm.load(device="cpu")
    # a page of its own digits: real statistics, in which one part of the image is unlike another
    latents = model.encode(2 * torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)) - 1)
    page = F.interpolate(latents, scale_factor=8, mode="bilinear") * torch.linspace(0, 2, 64).view(1, 1, -1, 1)
    whole = model.decode(page)
    encoded = model.first_stage_model.encode(whole).mean
    tile_vae(model, 64)
    bands = model.decode(page)
    assert (bands - whole).abs().max() < 2e-5  # measured: 3e-6
    assert (to_uint8(bands).int() - to_uint8(whole).int()).abs().max() <= 1
    torch.testing.assert_close(model.first_stage_model.encode(whole).mean, encoded, atol=2e-5, rtol=0)


def test_a_side_must_hold_a_latent():
    refused("tiles of 3 pixels are too small: a latent of this model has 4", tile_vae, model_with(), 3)


def test_pixels_need_no_bands():
    model, x = build(), random(2, 1, 16, 32)
    tile_vae(model, 4)
    assert torch.equal(model.decode(model.encode(x)), x)


MEASURE = """
import sys, torch
from types import SimpleNamespace
from benchmarks.common import process_memory, restart_peak
from ldm.inference.tiling import tile_vae
from ldm.models.autoencoder import AutoencoderKL

ddconfig = dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4],
                num_res_blocks=2, attn_resolutions=[], dropout=0.0)
torch.manual_seed(0)
vae = AutoencoderKL(ddconfig, embed_dim=4).eval().requires_grad_(False)
z = torch.randn(1, 4, 64, 64)
if sys.argv[1] == "bands":
    tile_vae(SimpleNamespace(first_stage_model=vae, downsampling=8), 128)
restart_peak()
start = process_memory()["VmHWM"]
with torch.inference_mode():
    pixels = vae.decode(z)
print((process_memory()["VmHWM"] - start) / 2**20)
torch.save(pixels, sys.argv[2])
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_result_at_the_size_of_stable_diffusion(tmp_path):
    peaks, pixels = {}, {}
    for way in ("whole", "bands"):
        path = tmp_path / f"{way}.pt"
        command = [sys.executable, "-c", MEASURE, way, str(path)]
        peaks[way] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        pixels[way] = torch.load(path)
    assert (pixels["bands"] - pixels["whole"]).abs().max() < 5e-5
    assert peaks["bands"] < 0.6 * peaks["whole"]  # measured: 440 of 900 to 964 MiB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.inference_mode()
def test_memory_on_a_gpu_is_that_of_a_band():
    model = model_with(ch=64)
    vae = model.first_stage_model.cuda()
    z, peaks, pixels = random(1, 4, 256, 256).cuda(), [], []
    for side in (None, 128):
        if side is not None:
            tile_vae(model, side)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pixels.append(vae.decode(z))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # what has the latents' size, 256 x 256, is whole: a sixteenth of the image's 1024 x 1024, as is the band
    assert peaks[1] < peaks[0] / 3
    torch.testing.assert_close(pixels[1], pixels[0], atol=1e-4, rtol=0)
