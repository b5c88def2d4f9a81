"""The plan of a UNet's levels: widths, blocks, and where there is attention."""

import pytest

from ldm.models.levels import Level, plan_levels


def test_stable_diffusion_2():
    """Attention at factors 1, 2 and 4, not at 8, and in the decoder's additional block too."""
    found = plan_levels(320, [1, 2, 4, 4], 2, [4, 2, 1])
    assert found == [Level(320, 2, 3), Level(640, 2, 3), Level(1280, 2, 3), Level(1280, 2, 0)]


def test_lists_have_an_entry_per_level():
    found = plan_levels(8, (1, 2), [1, 3], [1, 2], [1, 10], [True, False], [0, 2])
    assert found == [Level(8, 1, 0, 1, True), Level(16, 3, 2, 10, False)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_res_blocks": [1]}, r"num_res_blocks is \[1\]: give one number, or one per entry of channel_mult \(2\)"),
        ({"transformer_depth": [1, 2, 3]}, "transformer_depth is"),
        ({"disable_self_attentions": []}, "disable_self_attentions is"),
        ({"num_attention_blocks": [1, 2]}, "num_attention_blocks is 2 where num_res_blocks is 1"),
    ],
)
def test_what_does_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        plan_levels(
            **{"model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": []} | settings
        )
