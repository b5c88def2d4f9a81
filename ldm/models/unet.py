"""The UNet of latent diffusion (Rombach et al. 2022, after Dhariwal & Nichol 2021), under CompVis's parameter names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checks import Count, CountOrNone, Entries, Levels, Probability, Width
from ldm.models.attention import SpatialTransformer
from ldm.models.blocks import (
    COORDINATES,
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
    coordinate_channels,
    normalization,
    require_two_dims,
    timestep_embedding,
    zero_module,
)
from ldm.models.levels import Level, PerLevel, plan_levels


class UNetEncoder(nn.Module):
    """The first half of a UNet, as `UNetModel` and the noisy classifier have it.

    Both are dataclasses: their fields are the constructor's arguments, which the methods here read, and
    `__post_init__` builds the layers from x to the output.
    """

    model_channels: int
    dropout: float
    conv_resample: bool
    use_checkpoint: bool
    num_heads: int
    num_head_channels: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool
    norm_groups: int

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, in which the network computes."""
        return self.time_embed[0].weight.dtype

    def residual(self, channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResBlock:
        own: dict[str, Any] = {"use_scale_shift_norm": self.use_scale_shift_norm, "use_checkpoint": self.use_checkpoint}
        own |= {"up": up, "down": down, "norm_groups": self.norm_groups}
        return ResBlock(channels, 4 * self.model_channels, self.dropout, out_channels, **own)

    def downsample(self, width: int) -> nn.Module:
        return self.residual(width, width, down=True) if self.resblock_updown else Downsample(width, self.conv_resample)

    def attend(self, level: Level, part: str = "encoder") -> nn.Module:
        """Return the attention of a level; part: "encoder" or "middle" (or "decoder", in UNetModel)."""
        order = self.use_new_attention_order
        return AttentionBlock(
            level.width, self.num_heads, self.num_head_channels, self.use_checkpoint, order, self.norm_groups
        )

    def encoder(self, in_channels: int, levels: Sequence[Level]) -> tuple[nn.ModuleList, list[int]]:
        """Return the layers from x down to the lowest resolution, and the width of each one's output."""
        blocks = [TimestepEmbedSequential(nn.Conv2d(in_channels, self.model_channels, 3, padding=1))]
        widths = [self.model_channels]
        for i, level in enumerate(levels):
            for j in range(level.blocks):
                layers = [self.residual(widths[-1], level.width)]
                if j < level.attended:
                    layers.append(self.attend(level))
                blocks.append(TimestepEmbedSequential(*layers))
                widths.append(level.width)
            if i < len(levels) - 1:
                blocks.append(TimestepEmbedSequential(self.downsample(level.width)))
                widths.append(level.width)
        return nn.ModuleList(blocks), widths

    def middle(self, level: Level) -> TimestepEmbedSequential:
        width = level.width
        return TimestepEmbedSequential(
            self.residual(width, width), self.attend(level, "middle"), self.residual(width, width)
        )


@dataclass(eq=False, repr=False)
class UNetModel(UNetEncoder):
    """Predicts eps, x0, v or flow from a noisy image or latent. It has all of CompVis's v1 and v2 UNets for images.

    The fields are the constructor's arguments, in CompVis's order.
    """

    image_size: int | None  # for callers that read it; the network takes any size that is a multiple of `downsampling`
    in_channels: Width  # channels of x
    model_channels: Width  # width of the first level
    out_channels: Width  # channels of the prediction
    num_res_blocks: Count | Sequence[Count]  # per level, or one number for all; one list entry per level once built
    attention_resolutions: Sequence[int]  # the *downsampling factors* (1, 2, 4, ...) of the levels with attention
    dropout: Probability = 0.0  # in the residual blocks
    channel_mult: Levels = (1, 2, 4, 8)  # width of each level in units of model_channels
    conv_resample: bool = True  # resample with convolutions
    dims: int = 2  # must be 2
    # A number of classes (y: integer (b,)), "continuous" (y: (b, 1)) or "sequential" (y: (b, adm_in_channels), such as
    # pooled text). The embedded y is added to the embedded time.
    num_classes: Entries | str | None = None
    use_checkpoint: bool = False  # recompute activations in the backward pass
    use_fp16: bool = False  # no effect, as use_bf16: the network computes in its parameters' dtype
    use_bf16: bool = False  # no effect
    num_heads: Literal[-1] | Count = -1  # attention heads; set this or num_head_channels
    num_head_channels: Literal[-1] | Width = -1  # width of an attention head
    num_heads_upsample: Literal[-1] | Count = -1  # in legacy models' decoder, for num_heads; -1: num_heads
    use_scale_shift_norm: bool = False  # the time scales and shifts features (AdaGN) instead of being added
    resblock_updown: bool = False  # resample with residual blocks
    use_new_attention_order: bool = False  # the other channel layout of AttentionBlock
    use_spatial_transformer: bool = False  # transformers with cross-attention in place of attention blocks
    transformer_depth: CountOrNone | Sequence[CountOrNone] = 1  # blocks of each, per level (the middle as the last)
    context_dim: Width | Sequence[Width] | None = None  # width of the context, or one per transformer block
    n_embed: Entries | None = None  # predict logits over so many codebook entries instead
    legacy: bool = True  # how num_head_channels is read, see `attend`; False for Stable Diffusion
    disable_self_attentions: Sequence[bool] | None = None  # per level: each first attention is to the context too
    num_attention_blocks: Sequence[CountOrNone] | None = None  # per level: residual blocks with attention; default all
    disable_middle_self_attn: bool = False  # the same in the middle
    use_linear_in_transformer: bool = False  # linear, not convolutional, projections around the transformers
    adm_in_channels: Width | None = None  # width of y where num_classes is "sequential"
    norm_groups: Count = 32  # of every group normalisation; they must divide every width
    patch: Count = 1  # side of the squares whose pixels become one position; attention_resolutions count from it
    attention_type: str = "full"  # or "linear": `LinearAttentionBlock` in the levels, full attention in the middle
    attention_memory: CountOrNone = 0  # of LinearAttentionBlock
    coordinates: bool = False  # `coordinate_channels` join x: where text decides places, noise alone does not show them

    def __post_init__(self) -> None:
        super().__init__()
        self._check_arguments()
        self.downsampling = self.patch * 2 ** (len(self.channel_mult) - 1)  # sizes must be multiples of it
        levels = plan_levels(
            self.model_channels,
            self.channel_mult,
            self.num_res_blocks,
            self.attention_resolutions,
            self.transformer_depth,
            self.disable_self_attentions,
            self.num_attention_blocks,
        )
        self.num_res_blocks = PerLevel(level.blocks for level in levels)
        self.time_embed = time_mlp(self.model_channels, 4 * self.model_channels)
        if self.num_classes is not None:
            self.label_emb = self._label_embedding()
        channels = self.in_channels * self.patch**2 + (COORDINATES if self.coordinates else 0)
        self.input_blocks, skips = self.encoder(channels, levels)
        self.middle_block = self.middle(levels[-1]._replace(disable_self_attention=self.disable_middle_self_attn))
        self.output_blocks = self._decoder(levels, skips)
        width = levels[0].width
        self.out = nn.Sequential(
            normalization(width, self.norm_groups),
            nn.SiLU(),
            zero_module(nn.Conv2d(width, self.out_channels * self.patch**2, 3, padding=1)),
        )
        self.predict_codebook_ids = self.n_embed is not None
        if self.n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(width, self.norm_groups), nn.Conv2d(width, self.n_embed, 1))

    def attend(self, level: Level, part: str = "encoder") -> nn.Module:
        """Return the attention of a level: a transformer, linear attention or an attention block."""
        by_width = self.num_head_channels != -1
        heads = level.width // self.num_head_channels if by_width else self.num_heads
        if heads < 1:
            raise ValueError(
                f"num_heads {self.num_heads} and num_head_channels {self.num_head_channels} leave no attention head "
                f"at a width of {level.width} channels: give at least 1 head, or heads no wider than the layer"
            )
        common = {"use_checkpoint": self.use_checkpoint, "norm_groups": self.norm_groups}
        if self.use_spatial_transformer:
            # CompVis's first models ("legacy") fill all channels even where the head width does not divide them
            return SpatialTransformer(
                level.width,
                heads,
                self.num_head_channels if by_width and not self.legacy else level.width // heads,
                depth=level.depth,
                context_dim=self.context_dim,
                disable_self_attn=level.disable_self_attention,
                use_linear=self.use_linear_in_transformer,
                **common,
            )
        if part == "decoder" and self.num_heads_upsample != -1:
            heads = self.num_heads_upsample
        # unless "legacy", CompVis passes on a head width derived from num_heads, which makes num_heads_upsample inert
        head_width = self.num_head_channels if by_width or self.legacy else level.width // self.num_heads
        if self.attention_type == "linear" and part != "middle":
            from ldm.models.linear_attention import LinearAttentionBlock  # only such models need it

            return LinearAttentionBlock(level.width, heads, head_width, memory=self.attention_memory, **common)
        order = self.use_new_attention_order
        return AttentionBlock(level.width, heads, head_width, use_new_attention_order=order, **common)

    def convert_to_fp16(self) -> None:
        """Compute in float16: as `half`, under guided diffusion's name."""
        self.half()

    def convert_to_fp32(self) -> None:
        self.float()

    def upsample(self, width: int) -> nn.Module:
        return self.residual(width, width, up=True) if self.resblock_updown else Upsample(width, self.conv_resample)

    def _decoder(self, levels: Sequence[Level], skips: Sequence[int]) -> nn.ModuleList:
        """Return the layers back up; each takes in an encoder output (of widths `skips`), the last one first."""
        blocks, skips = [], list(skips)
        width = levels[-1].width
        for i, level in reversed(list(enumerate(levels))):
            for j in range(level.blocks + 1):
                layers = [self.residual(width + skips.pop(), level.width)]
                width = level.width
                if j < level.attended:
                    layers.append(self.attend(level, "decoder"))
                if i > 0 and j == level.blocks:
                    layers.append(self.upsample(width))
                blocks.append(TimestepEmbedSequential(*layers))
        return nn.ModuleList(blocks)

    def _label_embedding(self) -> nn.Module:
        width = 4 * self.model_channels
        if isinstance(self.num_classes, int):
            return nn.Embedding(self.num_classes, width)
        if self.num_classes == "continuous":
            return nn.Linear(1, width)
        if self.num_classes != "sequential":
            raise ValueError(
                f'num_classes is {self.num_classes!r}: give a number of classes, "continuous", "sequential" or None'
            )
        if self.adm_in_channels is None:
            raise ValueError('num_classes "sequential" needs adm_in_channels, the width of y')
        return nn.Sequential(time_mlp(self.adm_in_channels, width))

    def _check_arguments(self) -> None:
        require_two_dims(self.dims)
        if self.use_spatial_transformer != (self.context_dim is not None):
            raise ValueError(
                f"use_spatial_transformer is {self.use_spatial_transformer} and context_dim is {self.context_dim}: "
                "a spatial transformer needs a context_dim, and nothing else takes one"
            )
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise ValueError("num_heads and num_head_channels are both -1: set one of them")
        linear = self.attention_type == "linear"
        if self.attention_type not in ("full", "linear") or (linear and self.use_spatial_transformer):
            raise ValueError(
                f"attention_type {self.attention_type!r}: use full, or linear without use_spatial_transformer"
            )
        if self.patch < 1 or (self.patch > 1 and self.n_embed is not None):
            raise ValueError(f"patch is {self.patch}: it must be at least 1, and 1 with n_embed (here {self.n_embed})")

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | Sequence[Tensor] | None = None, y: Tensor | None = None
    ) -> Tensor:
        """Predict from a noisy image or latent.

        Args:
            x: (b, in_channels, h, w), variance-preserving; h and w must be multiples of `downsampling`.
            timesteps: (b,) in 0..T-1, fractional ones included.
            context: (b, n, context_dim), or a list with one per transformer block.
            y: as num_classes says.

        Returns:
            (b, out_channels, h, w) in x's dtype; with n_embed, (b, n_embed, h, w).
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
        elif isinstance(context, Tensor):
            context = context.to(dtype)
        h = F.pixel_unshuffle(x.to(dtype), self.patch)  # (b, in_channels patch^2, h / patch, w / patch)
        if self.coordinates:
            h = torch.cat([h, coordinate_channels(*h.shape[-2:]).to(h).expand(len(h), -1, -1, -1)], dim=1)
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
