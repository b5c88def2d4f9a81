"""The blocks and attention of each resolution of a UNet, from CompVis's arguments."""

from collections.abc import Sequence
from typing import NamedTuple


class PerLevel(list):
    """A number for each level, which `range` and indexing take for that number where it is the same for all."""

    def __index__(self) -> int:
        (number,) = set(self)
        return number


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
    given = {
        "num_res_blocks": num_res_blocks,
        "transformer_depth": transformer_depth,
        "disable_self_attentions": disable_self_attentions,
        "num_attention_blocks": num_attention_blocks,
    }
    levels, count = [], len(channel_mult)
    rows = zip(channel_mult, *(_per_level(name, value, count) for name, value in given.items()), strict=True)
    for i, (mult, blocks, depth, disabled, limit) in enumerate(rows):
        if limit is not None and limit > blocks:
            raise ValueError(f"num_attention_blocks is {limit} where num_res_blocks is {blocks}: it can be no larger")
        attended = blocks + 1 if limit is None else limit  # the decoder's additional block included
        attended = attended if 2**i in attention_resolutions else 0
        levels.append(Level(model_channels * mult, blocks, attended, depth, bool(disabled)))
    return levels


def _per_level(name: str, value: int | Sequence | None, levels: int) -> list:
    """Return one entry per level; a number or None serves all."""
    if value is None or isinstance(value, int):
        return [value] * levels
    if len(value) != levels:
        raise ValueError(f"{name} is {list(value)}: give one number, or one per entry of channel_mult ({levels})")
    return list(value)
