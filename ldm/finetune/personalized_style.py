"""The same data set for pictures of one style."""

from ldm.finetune import personalized
from ldm.finetune.textual_inversion import FRAMES


class PersonalizedBase(personalized.PersonalizedBase):
    """Captions say "in the style of"; otherwise as that for subjects."""

    frames = FRAMES["style"]
