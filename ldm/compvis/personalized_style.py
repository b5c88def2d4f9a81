"""The same data set for images of one style."""

from ldm.compvis import personalized
from ldm.finetune.textual_inversion import FRAMES


class PersonalizedBase(personalized.PersonalizedBase):
    """Captions say "in the style of"; otherwise as that for subjects."""

    frames = FRAMES["style"]
