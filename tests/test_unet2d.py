"""The teaching UNet: counts as published, diffusers' blocks, and the known mistakes of the NumPy original."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from golden_fill import count, fill, randn, untrained
from torch import nn

from ldm.models.blocks import normalization, timestep_embedding
from ldm.optional.unet2d import ResidualBlock, SelfAttention, UNet2D, UpsampleTo

COURSE = {"num_classes": 10, "order": "post", "attention": "bare"}
SMALL = {"widths": (8, 16, 8), "norm_groups": 4, "head_channels": 4, "num_classes": 10}


# As published.


def test_parameters_and_tensors_are_as_many_as_published():
    with torch.device("meta"):
        model = UNet2D(**COURSE)
        assert (count(model), len(list(model.parameters()))) == (991_201, 231)
        assert isinstance(model.class_embed, nn.Embedding) and model.class_embed.weight.shape == (10, 128)
        # group normalisation of the attention; a kernel of 16 places for one of 9 in both upsamplings
        assert count(UNet2D(**COURSE | {"attention": "residual"})) == 991_201 + 64
        assert count(UNet2D(**COURSE | {"upsample": "transpose"})) == 991_201 + (16 - 9) * (32**2 + 64**2)
        norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
        assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-5)}


@pytest.mark.parametrize("upsample", ["interpolate", "transpose"])
def test_seventeen_blocks_nine_skips_and_the_sizes_14_7_4_7_14(upsample):
    model = UNet2D(**COURSE, upsample=upsample)
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    decoding = [module for module in model.decoder if isinstance(module, ResidualBlock)]
    assert (len(blocks), 1 + len(model.encoder), len(decoding)) == (17, 9, 9)
    sizes = []
    for layer in (model.conv_in, *model.encoder, *model.decoder):
        layer.register_forward_hook(lambda layer, inputs, out: sizes.append(out.shape[-1]))
    assert model(randn(1, 1, 14, 14), torch.tensor([5]), y=torch.tensor([3])).shape == (1, 1, 14, 14)
    assert sizes == [14, 14, 14, 7, 7, 7, 4, 4, 4] + [4, 4, 4, 7, 7, 7, 7, 14, 14, 14, 14]


@pytest.mark.parametrize("upsample", ["interpolate", "transpose"])
@pytest.mark.parametrize("height, width", [(14, 14), (13, 9), (7, 28), (2, 3), (1, 1)])
def test_every_size_comes_back(upsample, height, width):
    model = UNet2D(**SMALL, upsample=upsample)
    assert model.downsampling == 1
    x = randn(2, 1, height, width)
    assert model(x, torch.tensor([5, 9]), y=torch.tensor([3, 0])).shape == x.shape


def test_the_class_is_added_to_the_time():
    model = fill(UNet2D(**SMALL), 1)
    seen = []
    model.encoder[0].register_forward_hook(lambda block, inputs, out: seen.append(inputs[1]))
    t, y = torch.tensor([4, 700]), torch.tensor([9, 2])
    outputs = model(randn(2, 1, 6, 6), t, y=y)
    time = model.time_embed(timestep_embedding(t, 8, sines_first=True))
    torch.testing.assert_close(seen[0], time + model.class_embed.weight[y])
    refused("give y if and only if the network has classes", model, randn(2, 1, 6, 6), t, error=AssertionError)
    plain = fill(UNet2D(**SMALL | {"num_classes": None}), 1)
    assert plain(randn(2, 1, 6, 6), t).shape == outputs.shape


# The parts.


def test_orders_of_the_residual_block():
    x, emb = randn(2, 8, 5, 5).double(), randn(2, 12).double()
    pre, post = (fill(ResidualBlock(8, 8, 12, order, 4), 1).double() for order in ("pre", "post"))
    time = emb.sigmoid() * emb

    def shift(block):
        return (time @ block.emb[1].weight.T + block.emb[1].bias)[:, :, None, None]

    h = pre.conv1(F.silu(F.group_norm(x, 4, pre.norm1.weight, pre.norm1.bias)))
    h = pre.conv2(F.silu(F.group_norm(h + shift(pre), 4, pre.norm2.weight, pre.norm2.bias)))
    torch.testing.assert_close(pre(x, emb), x + h)
    h = F.silu(F.group_norm(post.conv1(x), 4, post.norm1.weight, post.norm1.bias)) + shift(post)
    h = F.silu(F.group_norm(post.conv2(h), 4, post.norm2.weight, post.norm2.bias))
    torch.testing.assert_close(post(x, emb), post.skip(x) + h)
    assert post.skip.kernel_size == (1, 1)


def test_a_pre_normalised_block_starts_as_its_skip():
    x, emb = randn(2, 8, 5, 5), randn(2, 12)
    assert torch.equal(ResidualBlock(8, 8, 12, "pre", 4)(x, emb), x)
    wider = ResidualBlock(8, 16, 12, "pre", 4)
    assert torch.equal(wider(x, emb), wider.skip(x)) and wider.skip.kernel_size == (1, 1)


@pytest.mark.parametrize("mode", ["residual", "bare"])
def test_attention_is_scaled_dot_products(mode):
    block = fill(SelfAttention(32, 8, mode, 32), 1)
    x = randn(2, 32, 4, 3)
    tokens = (block.norm(x) if mode == "residual" else x).reshape(2, 32, 12).permute(0, 2, 1)
    q, k, v = (
        (tokens @ layer.weight.T + layer.bias).reshape(2, 12, 4, 8).permute(0, 2, 1, 3)
        for layer in (block.to_q, block.to_k, block.to_v)
    )
    fused = F.scaled_dot_product_attention(q, k, v)
    weights = (torch.einsum("bhnd,bhmd->bhnm", q, k) / 8**0.5).softmax(-1)
    torch.testing.assert_close(torch.einsum("bhnm,bhmd->bhnd", weights, v), fused, atol=1e-6, rtol=0)
    expected = block.to_out(fused.permute(0, 2, 1, 3).reshape(2, 12, 32)).permute(0, 2, 1).reshape(2, 32, 4, 3)
    expected = x + expected if mode == "residual" else expected
    torch.testing.assert_close(block(x), expected, atol=1e-6, rtol=0)


def test_upsampling_takes_the_nearest_neighbour():
    """The two worked examples of the text, along the width: 3 -> 5, and the gradient back."""
    block = UpsampleTo(1, "interpolate")
    with torch.no_grad():  # a convolution that changes nothing
        block.conv.weight.copy_(torch.eye(3)[1][:, None] * torch.eye(3)[1])
        block.conv.bias.zero_()
    x = torch.tensor([0.1, 0.2, 0.3]).view(1, 1, 1, 3).requires_grad_()
    out = block(x, (1, 5))
    assert out.flatten().tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3])
    out.backward(torch.tensor([1.0, 2, 3, 4, 5]).view(1, 1, 1, 5))
    assert x.grad.flatten().tolist() == [3, 7, 5]
    for size, larger in [(4, 7), (7, 14), (3, 5), (1, 2)]:
        x = torch.arange(size).float().view(1, 1, size, 1)
        indices = [i * size // larger for i in range(larger)]
        assert block(x, (larger, 1)).flatten().tolist() == indices


def test_transposed_upsampling_is_the_strided_convolutions_gradient():
    block = fill(UpsampleTo(3, "transpose"), 1)
    x = randn(1, 3, 4, 4)
    even = block(x, (8, 8))
    image = randn(1, 3, 8, 8).requires_grad_()
    down = F.conv2d(image, block.conv.weight, stride=2, padding=1)  # its transpose: (8, 8) -> (4, 4)
    (gradient,) = torch.autograd.grad(down, image, x)
    torch.testing.assert_close(even, gradient + block.conv.bias[:, None, None])
    assert torch.equal(block(x, (7, 8)), even[:, :, :7])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"order": "mid"}, "order 'mid' is unknown"),
        ({"attention": "linear"}, "attention 'linear' is unknown: it is residual or bare"),
        ({"upsample": "nearest"}, "upsample 'nearest' is unknown: it is interpolate or transpose"),
        ({"widths": (8, 18)}, "18 channels do not split into 4 groups"),
        ({"head_channels": 3}, "8 channels do not split into heads: num_head_channels is 3"),
    ],
)
def test_bad_arguments_are_refused(changes, words):
    refused(words, UNet2D, **SMALL | changes)


# Against an independent implementation.


def test_with_blocks_normalised_first_it_is_diffusers_unet():
    from diffusers import UNet2DModel

    sizes = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16, 8), "norm_num_groups": 4}
    sizes |= {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3, "attention_head_dim": 4}
    theirs = UNet2DModel(**sizes, num_class_embeds=10, flip_sin_to_cos=False, freq_shift=0).eval()
    fill(theirs, 3)
    ours = UNet2D(**SMALL, attention="residual").eval()
    encoder, decoder = [], []
    for block in theirs.down_blocks:
        encoder += [*block.resnets, *(down.conv for down in block.downsamplers or ())]
    for block in theirs.up_blocks:
        decoder += [*block.resnets, *(block.upsamplers or ())]
    middle = [theirs.mid_block.resnets[0], theirs.mid_block.attentions[0], theirs.mid_block.resnets[1]]
    pairs = list(zip([*ours.encoder, *ours.middle, *ours.decoder], [*encoder, *middle, *decoder], strict=True))
    for own, other in pairs:
        own.load_state_dict(renamed(own, other.state_dict()))
    ours.time_embed.load_state_dict(renamed(ours.time_embed, theirs.time_embedding.state_dict()))
    ours.class_embed.load_state_dict(theirs.class_embedding.state_dict())
    ours.conv_in.load_state_dict(theirs.conv_in.state_dict())
    ours.out[0].load_state_dict(theirs.conv_norm_out.state_dict())
    ours.out[2].load_state_dict(theirs.conv_out.state_dict())
    assert count(ours) == count(theirs)
    x, t, y = randn(2, 1, 16, 12), torch.tensor([3, 900]), torch.tensor([7, 0])
    with torch.no_grad():
        expected = theirs(x, t, class_labels=y).sample
        torch.testing.assert_close(ours(x, t, y=y), expected, atol=2e-6, rtol=1e-5)
    assert float(expected.std()) > 0.1


def renamed(own: nn.Module, state: dict) -> dict:
    """diffusers' names of one layer -> ours."""
    table = {"time_emb_proj": "emb.1", "conv_shortcut": "skip", "group_norm": "norm", "to_out.0": "to_out"}
    table |= {"linear_1": "0", "linear_2": "2"}
    new = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        new[".".join(filter(None, (table.get(layer, layer), kind)))] = tensor
    return new


# What the NumPy original got wrong.


@pytest.mark.parametrize("order, attention", [("post", "bare"), ("pre", "residual")])
@pytest.mark.parametrize("upsample", ["interpolate", "transpose"])
def test_every_parameter_learns(order, attention, upsample):
    """In the original 38 of 231 tensors never did (E8): every block's time projection and both upsamplings."""
    model = UNet2D(**SMALL, order=order, attention=attention, upsample=upsample)
    if order == "pre":  # a convolution of zeros hides what is behind it from the very first gradient
        fill(model, 1)
    y = torch.arange(10)
    model(randn(10, 1, 7, 7), torch.linspace(0, 999, 10).long(), y=y).square().mean().backward()
    # a key's bias adds the same to all scores of a query, which the softmax takes out: rounding alone is left
    assert [name for name in untrained(model) if not name.endswith("to_k.bias")] == []
    with torch.device("meta"):
        published = UNet2D(**COURSE)
    idle = [block.emb[1] for block in published.modules() if isinstance(block, ResidualBlock)]
    idle += [layer.conv for layer in published.decoder if isinstance(layer, UpsampleTo)]
    assert (2 * len(idle), sum(map(count, idle))) == (38, 136_992)


def test_repeated_classes_add_up():
    """In the original the last of several images of a class overwrote the others' gradients (E9)."""
    model = fill(UNet2D(**SMALL), 1).double()
    x, t = randn(3, 1, 6, 6).double(), torch.tensor([1, 500, 999])

    def gradient(chosen, y):
        model.zero_grad()
        model(x[chosen], t[chosen], y=torch.tensor(y)).square().sum().backward()
        return model.class_embed.weight.grad.clone()

    together = gradient([0, 1, 2], [4, 4, 7])
    torch.testing.assert_close(together, gradient([0], [4]) + gradient([1], [4]) + gradient([2], [7]))
    assert together[4].abs().sum() > 0 and together[7].abs().sum() > 0
    assert not together[[0, 1, 2, 3, 5, 6, 8, 9]].any()
    assert not torch.allclose(together[4], gradient([1], [4])[4])


def test_group_normalisations_gain_learns_from_the_normalised_values():
    """In the original it learnt from the output, gain and bias included (E10)."""
    norm = normalization(4, groups=2).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 2, 3, -1]))
        norm.bias.copy_(torch.tensor([1.0, -1, 0.5, 2]))
    x, upstream = randn(3, 4, 5, 5).double(), randn(3, 4, 5, 5, seed=1).double()
    norm(x).backward(upstream)
    grouped = x.reshape(3, 2, -1)
    deviation = (grouped.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    straight = ((grouped - grouped.mean(-1, keepdim=True)) / deviation).reshape(x.shape)
    torch.testing.assert_close(norm.weight.grad, (upstream * straight).sum((0, 2, 3)))
    torch.testing.assert_close(norm.bias.grad, upstream.sum((0, 2, 3)))
    wrong = (upstream * norm(x).detach()).sum((0, 2, 3))
    assert float((wrong - norm.weight.grad).abs().min()) > 0.1
    assert torch.autograd.gradcheck(lambda *affine: F.group_norm(x, 2, *affine), (norm.weight, norm.bias))


# Convolution as a product of matrices.


def im2col(x: torch.Tensor, size: int, stride: int = 1) -> torch.Tensor:
    """The windows of an image (h, w) as rows, by slicing: (n, size * size)."""
    corners = [range(0, side - size + 1, stride) for side in x.shape]
    return torch.stack([x[i : i + size, j : j + size].flatten() for i, j in product(*corners)])


def test_convolution_by_im2col():
    x = torch.arange(1.0, 10).reshape(3, 3)
    kernel = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    expected = torch.tensor([3.7, 4.7, 6.7, 7.7])
    columns = F.unfold(x[None, None], 2)[0]  # (places in the kernel, windows)
    assert torch.equal(columns.T, im2col(x, 2))
    torch.testing.assert_close(im2col(x, 2) @ kernel.flatten(), expected)
    torch.testing.assert_close(F.conv2d(x[None, None], kernel[None, None]).flatten(), expected)
    # The text multiplies from the other side (E4). Of a 3 x 3 image and a 2 x 2 kernel the windows are a symmetric
    # matrix, x[i + k, j + l] with all four from 0 to 1, and it is right; with stride 2 they are not.
    torch.testing.assert_close(kernel.flatten() @ im2col(x, 2), expected)
    x = torch.arange(1.0, 17).reshape(4, 4)
    expected = F.conv2d(x[None, None], kernel[None, None], stride=2).flatten()
    torch.testing.assert_close(im2col(x, 2, stride=2) @ kernel.flatten(), expected)
    assert float((kernel.flatten() @ im2col(x, 2, stride=2) - expected).abs().max()) > 1


@pytest.mark.parametrize("stride", [1, 2])
def test_unfold_and_fold_are_the_networks_convolutions(stride):
    """Forward as in the text; its backward pass, col2im, adds overlapping windows up."""
    layer = fill(nn.Conv2d(2, 3, 3, stride=stride, padding=1), 1).double()
    x = randn(2, 2, 7, 7).double().requires_grad_()
    out = layer(x)
    weight = layer.weight.flatten(1)  # (3, 2 * 3 * 3)
    by_matrix = weight @ F.unfold(x, 3, padding=1, stride=stride) + layer.bias[:, None]
    torch.testing.assert_close(by_matrix.reshape(out.shape), out)
    upstream = randn(*out.shape, seed=1).double()
    (gradient,) = torch.autograd.grad(out, x, upstream)
    back = F.fold(weight.T @ upstream.flatten(2), (7, 7), 3, padding=1, stride=stride)
    torch.testing.assert_close(back, gradient)
