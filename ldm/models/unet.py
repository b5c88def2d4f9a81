"""The UNet of latent diffusion (Rombach et al. 2022, after Dhariwal & Nichol 2021), under CompVis's parameter names."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import SpatialTransformer
from ldm.models.blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
    normalization,
    require_two_dims,
    timestep_embedding,
    zero_module,
)
from ldm.models.levels import Level, plan_levels
from ldm.models.linear_attention import LinearAttentionBlock


@dataclass(frozen=True)
class Parts:
    """Makes the layers of one UNet, or of its encoder half; the fields are UNetModel's arguments."""

    emb_channels: int
    dropout: float
    conv_resample: bool
    use_checkpoint: bool
    num_heads: int
    num_head_channels: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool
    norm_groups: int
    num_heads_upsample: int = -1
    use_spatial_transformer: bool = False
    context_dim: int | Sequence[int] | None = None
    legacy: bool = True
    use_linear_in_transformer: bool = False
    attention_type: str = "full"
    attention_memory: int = 0

    def res(self, channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResBlock:
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropout,
            out_channels=out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            use_checkpoint=self.use_checkpoint,
            up=up,
            down=down,
            norm_groups=self.norm_groups,
        )

    def down(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.res(channels, channels, down=True)
        return Downsample(channels, self.conv_resample)

    def up(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.res(channels, channels, up=True)
        return Upsample(channels, self.conv_resample)

    def attend(
        self,
        channels: int,
        depth: int,
        disable_self_attention: bool = False,
        decoder: bool = False,
        middle: bool = False,
    ) -> nn.Module:
        by_width = self.num_head_channels != -1
        heads = channels // self.num_head_channels if by_width else self.num_heads
        if heads < 1:
            raise ValueError(
                f"num_heads {self.num_heads} and num_head_channels {self.num_head_channels} leave no attention head "
                f"at a width of {channels} channels: give at least 1 head, or heads no wider than the layer"
            )
        if self.use_spatial_transformer:
            # CompVis's first models ("legacy") fill all channels even where the head width does not divide them
            width = self.num_head_channels if by_width and not self.legacy else channels // heads
            return SpatialTransformer(
                channels,
                heads,
                width,
                depth=depth,
                context_dim=self.context_dim,
                disable_self_attn=disable_self_attention,
                use_linear=self.use_linear_in_transformer,
                use_checkpoint=self.use_checkpoint,
                norm_groups=self.norm_groups,
            )
        # unless "legacy", CompVis passes on a head width derived from num_heads, which makes num_heads_upsample inert
        width = self.num_head_channels if by_width or self.legacy else channels // heads
        if self.attention_type == "linear" and not middle:
            return LinearAttentionBlock(
                channels,
                self.num_heads_upsample if decoder else heads,
                width,
                memory=self.attention_memory,
                use_checkpoint=self.use_checkpoint,
                norm_groups=self.norm_groups,
            )
        return AttentionBlock(
            channels,
            num_heads=self.num_heads_upsample if decoder else heads,
            num_head_channels=width,
            use_checkpoint=self.use_checkpoint,
            use_new_attention_order=self.use_new_attention_order,
            norm_groups=self.norm_groups,
        )

    def middle(self, channels: int, depth: int = 1, disable_self_attention: bool = False) -> TimestepEmbedSequential:
        return TimestepEmbedSequential(
            self.res(channels, channels),
            self.attend(channels, depth, disable_self_attention, middle=True),
            self.res(channels, channels),
        )


def encoder_blocks(parts: Parts, in_channels: int, stem: int, levels: list[Level]) -> tuple[nn.ModuleList, list[int]]:
    """The layers from x down to the lowest resolution, and the width that each of them hands to the decoder."""
    blocks = [TimestepEmbedSequential(nn.Conv2d(in_channels, stem, 3, padding=1))]
    widths = [stem]
    for i, level in enumerate(levels):
        for j in range(level.blocks):
            layers = [parts.res(widths[-1], level.width)]
            if j < level.attended:
                layers.append(parts.attend(level.width, level.depth, level.disable_self_attention))
            blocks.append(TimestepEmbedSequential(*layers))
            widths.append(level.width)
        if i < len(levels) - 1:
            blocks.append(TimestepEmbedSequential(parts.down(level.width)))
            widths.append(level.width)
    return nn.ModuleList(blocks), widths


def _decoder(parts: Parts, levels: list[Level], skips: list[int]) -> nn.ModuleList:
    """The layers back up; each first takes in one of the encoder's outputs (of widths `skips`), the last one first."""
    blocks = []
    width = levels[-1].width
    skips = list(skips)
    for i, level in reversed(list(enumerate(levels))):
        for j in range(level.blocks + 1):
            layers = [parts.res(width + skips.pop(), level.width)]
            width = level.width
            if j < level.attended:
                layers.append(parts.attend(width, level.depth, level.disable_self_attention, decoder=True))
            if i > 0 and j == level.blocks:
                layers.append(parts.up(width))
            blocks.append(TimestepEmbedSequential(*layers))
    return nn.ModuleList(blocks)


class UNetModel(nn.Module):
    """Predicts eps, x0 or v from a noisy image or latent x, with everything CompVis's v1 and v2 UNets take for images.

    The arguments that do not explain themselves:
    image_size: kept for outside readers; the network takes any size that halves len(channel_mult) - 1 times.
    num_res_blocks: per level, or one number for all.
    attention_resolutions: the *downsampling factors* (1, 2, 4, ...) at which there is attention.
    channel_mult: width of each level in units of model_channels.
    conv_resample: convolutions in the resampling layers; resblock_updown makes them residual blocks instead.
    dims: must be 2.
    num_classes: None; a number of classes (y: integer (b,)); "continuous" (y: (b, 1)); or "sequential" (y:
        (b, adm_in_channels), such as pooled text). The embedded y is added to the embedded time.
    use_fp16, use_bf16: accepted for CompVis's configs, without effect: the network computes in its parameters' dtype.
    num_heads / num_head_channels: one of the two, the other -1. num_heads_upsample: for the decoder, -1 = num_heads;
        it acts, as in CompVis's code, on attention blocks of legacy models only.
    use_scale_shift_norm: the time scales and shifts features (AdaGN) instead of being added.
    use_new_attention_order: the other channel layout of AttentionBlock.
    use_spatial_transformer: transformers with cross-attention to a context of width context_dim (or one width per
        transformer block) in place of attention blocks; transformer_depth blocks each, per level (the middle takes
        the last level's) or one number for all.
    n_embed: predicts logits over so many codebook entries instead.
    legacy: how num_head_channels is read, see Parts.attend; False for Stable Diffusion.
    disable_self_attentions: per level; True makes the first attention of each transformer look at the context too;
        disable_middle_self_attn the same for the middle.
    num_attention_blocks: per level, how many residual blocks are followed by attention; default all.
    use_linear_in_transformer: linear instead of convolutional projections around the transformers.
    norm_groups: groups of every group normalisation; they must divide every width.
    attention_type: "full", or "linear": `LinearAttentionBlock`, with `attention_memory`, in the levels; the middle,
        which has the fewest positions, keeps full attention. It does not go with use_spatial_transformer.
    patch: the network sees squares of so many pixels as the channels of one position, which makes it faster by about as
        many squared; attention_resolutions count from there.

    Raises ValueError for arguments that exclude each other or do not fit.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        use_bf16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | Sequence[int] | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
        norm_groups: int = 32,
        patch: int = 1,
        attention_type: str = "full",
        attention_memory: int = 0,
    ) -> None:
        super().__init__()
        require_two_dims(dims)
        _check_attention(use_spatial_transformer, context_dim, num_heads, num_head_channels)
        if attention_type not in ("full", "linear") or (attention_type == "linear" and use_spatial_transformer):
            raise ValueError(f"attention_type {attention_type!r}: use full, or linear without use_spatial_transformer")
        if patch < 1 or (patch > 1 and n_embed is not None):
            raise ValueError(f"patch is {patch}: it must be at least 1, and 1 with n_embed (here {n_embed})")
        self.image_size = image_size
        self.in_channels = in_channels
        self.patch = patch
        self.downsampling = patch * 2 ** (len(channel_mult) - 1)  # sizes must be multiples of it
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_classes = num_classes
        levels = plan_levels(
            model_channels,
            channel_mult,
            num_res_blocks,
            attention_resolutions,
            transformer_depth,
            disable_self_attentions,
            num_attention_blocks,
        )
        self.num_res_blocks = [level.blocks for level in levels]
        parts = Parts(
            emb_channels=4 * model_channels,
            dropout=dropout,
            conv_resample=conv_resample,
            use_checkpoint=use_checkpoint,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            num_heads_upsample=num_heads if num_heads_upsample == -1 else num_heads_upsample,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
            use_spatial_transformer=use_spatial_transformer,
            context_dim=context_dim,
            legacy=legacy,
            use_linear_in_transformer=use_linear_in_transformer,
            norm_groups=norm_groups,
            attention_type=attention_type,
            attention_memory=attention_memory,
        )
        self.time_embed = time_mlp(model_channels, parts.emb_channels)
        if num_classes is not None:
            self.label_emb = _label_embedding(num_classes, adm_in_channels, parts.emb_channels)
        self.input_blocks, skips = encoder_blocks(parts, in_channels * patch**2, model_channels, levels)
        width = levels[-1].width
        self.middle_block = parts.middle(width, levels[-1].depth, disable_middle_self_attn)
        self.output_blocks = _decoder(parts, levels, skips)
        width = levels[0].width
        self.out = nn.Sequential(
            normalization(width, norm_groups),
            nn.SiLU(),
            zero_module(nn.Conv2d(width, out_channels * patch**2, 3, padding=1)),
        )
        self.predict_codebook_ids = n_embed is not None
        if n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(width, norm_groups), nn.Conv2d(width, n_embed, 1))

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, in which the network computes."""
        return self.time_embed[0].weight.dtype

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | Sequence[Tensor] | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """x (b, in_channels, h, w), variance-preserving; timesteps (b,) in 0..T-1, fractional ones included; context
        (b, n, context_dim), or a list with one per transformer block; y as num_classes says. h and w must halve
        len(channel_mult) - 1 times.

        Returns (b, out_channels, h, w) in x's dtype ((b, n_embed, h, w) with n_embed, which goes with patch 1).
        Raises ValueError when y is missing or not expected.
        """
        if (y is None) != (self.num_classes is None):
            state = "needs y" if y is None else "takes no y"
            raise ValueError(f"a UNet with num_classes {self.num_classes!r} {state}")
        dtype = self.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))  # (b, 4 model_channels)
        if y is not None:
            emb = emb + self.label_emb(y.to(dtype) if isinstance(self.num_classes, str) else y)
        if isinstance(context, list | tuple):
            context = [part.to(dtype) for part in context]
        elif context is not None:
            context = context.to(dtype)
        h = F.pixel_unshuffle(x.to(dtype), self.patch)  # (b, in_channels patch^2, h / patch, w / patch)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, context)  # (b, width of the level, 2^level times smaller)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)  # back up to (b, c, h / patch, w / patch)
        h = self.id_predictor(h) if self.predict_codebook_ids else self.out(h)
        return F.pixel_shuffle(h, self.patch).to(x.dtype)


def time_mlp(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))


def _label_embedding(num_classes: int | str, adm_in_channels: int | None, width: int) -> nn.Module:
    """The module that embeds y; see num_classes in UNetModel."""
    if isinstance(num_classes, int):
        return nn.Embedding(num_classes, width)
    if num_classes == "continuous":
        return nn.Linear(1, width)
    if num_classes != "sequential":
        raise ValueError(
            f'num_classes is {num_classes!r}: give a number of classes, "continuous", "sequential" or None'
        )
    if adm_in_channels is None:
        raise ValueError('num_classes "sequential" needs adm_in_channels, the width of y')
    return nn.Sequential(time_mlp(adm_in_channels, width))


def _check_attention(
    use_spatial_transformer: bool, context_dim: int | Sequence[int] | None, num_heads: int, num_head_channels: int
) -> None:
    if use_spatial_transformer != (context_dim is not None):
        raise ValueError(
            f"use_spatial_transformer is {use_spatial_transformer} and context_dim is {context_dim}: "
            "a spatial transformer needs a context_dim, and nothing else takes one"
        )
    if num_heads == -1 and num_head_channels == -1:
        raise ValueError("set num_heads or num_head_channels: both are -1, so the number of attention heads is open")
