"""The blocks and attention of each resolution of a UNet, from CompVis's arguments."""

from collections.abc import Sequence
from typing import NamedTuple


class Level(NamedTuple):
    """One resolution of a UNet."""

    width: int  # channels
    blocks: int  # residual blocks in the encoder; the decoder has one more
    attended: int  # how many of them, from the first, are followed by attention
    depth: int = 1
    disable_self_attention: bool = False


def plan_levels(
    model_channels: int,
    channel_mult: Sequence[int],
    num_res_blocks: int | Sequence[int],
    attention_resolutions: Sequence[int],
    transformer_depth: int | Sequence[int] = 1,
    disable_self_attentions: Sequence[bool] | None = None,
    num_attention_blocks: Sequence[int] | None = None,
) -> list[Level]:
    """Return the levels from the highest resolution down, by arguments of `unet.UNetModel`."""
    count = len(channel_mult)
    blocks = _per_level("num_res_blocks", num_res_blocks, count)
    depths = _per_level("transformer_depth", transformer_depth, count)
    disabled = _per_level("disable_self_attentions", disable_self_attentions, count)
    limits = _per_level("num_attention_blocks", num_attention_blocks, count)
    return [
        Level(
            width=model_channels * channel_mult[i],
            blocks=blocks[i],
            attended=_attended(blocks[i], limits[i], 2**i in attention_resolutions),
            depth=depths[i],
            disable_self_attention=bool(disabled[i]),
        )
        for i in range(count)
    ]


def _per_level(name: str, value: int | Sequence | None, levels: int) -> list:
    """Return one entry per level; a number or None serves all. Raise ValueError for a list of another length."""
    if value is None or isinstance(value, int):
        return [value] * levels
    if len(value) != levels:
        raise ValueError(f"{name} is {list(value)}: give one number, or one per entry of channel_mult ({levels})")
    return list(value)


def _attended(blocks: int, limit: int | None, has_attention: bool) -> int:
    """Return how many blocks of a level are followed by attention, the decoder's additional block included."""
    if limit is not None and limit > blocks:
        raise ValueError(f"num_attention_blocks is {limit} where num_res_blocks is {blocks}: it can be no larger")
    if not has_attention:
        return 0
    return blocks + 1 if limit is None else limit
