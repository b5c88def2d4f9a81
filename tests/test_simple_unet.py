import pytest
import torch
from conftest import refused
from golden_fill import count, fill, randn, untrained
from torch import nn

from ldm.models.blocks import timestep_embedding
from ldm.optional.simple_unet import Block, SimpleUNet

SMALL = {"channels": 1, "widths": [8, 16, 24], "time_channels": 8}


@pytest.mark.parametrize("shared_norm, parameters", [(False, 62_438_883), (True, 62_433_123)])
def test_parameters_are_as_many_as_published(shared_norm, parameters):
    with torch.device("meta"):
        assert count(SimpleUNet(shared_norm=shared_norm)) == parameters


def test_the_two_counts_differ_by_one_normalisation_a_block():
    with torch.device("meta"):
        norms = [module for module in SimpleUNet().modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 16 and sum(map(count, norms)) // 2 == 62_438_883 - 62_433_123 == 5_760


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height, width", [(32, 32), (8, 12)])
def test_sizes(channels, height, width):
    model = SimpleUNet(**SMALL | {"channels": channels})
    assert model.downsampling == 4
    x = randn(2, channels, height, width)
    assert model(x, torch.tensor([0, 299])).shape == x.shape
    sizes = []
    for block in (*model.down_blocks, *model.up_blocks):
        block.register_forward_hook(lambda block, inputs, out: sizes.append(out.shape[1:]))
    model(x, torch.tensor([0, 299]))
    halves, quarters = (height // 2, width // 2), (height // 4, width // 4)
    assert sizes == [(16, *halves), (24, *quarters), (16, *halves), (8, height, width)]


@pytest.mark.parametrize("shared_norm", [False, True])
def test_every_parameter_learns(shared_norm):
    model = SimpleUNet(**SMALL, shared_norm=shared_norm)
    model(randn(4, 1, 8, 8), torch.tensor([0, 5, 100, 299])).square().mean().backward()
    assert untrained(model) == []


def test_block_is_convolution_relu_normalisation_and_time_between():
    block = fill(Block(3, 5, nn.Conv2d(5, 5, 4, stride=2, padding=1), 8, shared_norm=False), 1).double().eval()
    for norm in block.norms:  # running statistics that are neither 0 nor 1
        norm.running_mean.copy_(torch.linspace(-0.2, 0.3, 5))
        norm.running_var.copy_(torch.linspace(0.5, 2, 5))
    x, emb = randn(2, 3, 6, 6).double(), randn(2, 8).double()

    def normalise(norm, h):
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        return (h - norm.running_mean[:, None, None]) * gain[:, None, None] + norm.bias[:, None, None]

    h = normalise(block.norms[0], block.conv1(x).relu())
    h = h + (emb @ block.time.weight.T + block.time.bias).relu()[:, :, None, None]
    h = normalise(block.norms[1], block.conv2(h).relu())
    torch.testing.assert_close(block(x, emb), block.resample(h))


def test_a_shared_normalisation_gathers_statistics_of_both_places():
    block = fill(Block(3, 5, nn.Identity(), 8, shared_norm=True), 1).train()
    x, emb = randn(4, 3, 6, 6), randn(4, 8)
    first = block.conv1(x).relu()
    norm = nn.BatchNorm2d(5)
    norm.load_state_dict(block.norms[0].state_dict())
    second = block.conv2(norm(first) + block.time(emb).relu()[:, :, None, None]).relu()
    norm(second)
    block(x, emb)
    assert block.norms[0].num_batches_tracked == 2
    torch.testing.assert_close(block.norms[0].running_mean, norm.running_mean)


def test_time_enters_sines_first():
    model = fill(SimpleUNet(**SMALL), 1).eval()
    seen = []
    model.time_embed.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    t = torch.tensor([0, 250])
    outputs = model(randn(1, 1, 8, 8).expand(2, -1, -1, -1), t)
    assert torch.equal(seen[0], timestep_embedding(t, 8, sines_first=True, shift=1))
    assert torch.equal(seen[0][0], torch.tensor([0.0] * 4 + [1.0] * 4))
    assert float((outputs[0] - outputs[1]).detach().abs().max()) > 1e-4


@pytest.mark.parametrize(
    "changes, words",
    [({"widths": [8]}, "widths is .8.: give one"), ({"time_channels": 7}, "time_channels is 7: it must be even")],
)
def test_bad_arguments_are_refused(changes, words):
    refused(words, SimpleUNet, **SMALL | changes)
