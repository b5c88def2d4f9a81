"""The same data set for images of one style; a file of its own, because both classes have one name."""

from ldm.compvis import personalized
from ldm.finetune.textual_inversion import FRAMES


class PersonalizedBase(personalized.PersonalizedBase):
    """Images of one style: captions contain "in the style of"."""

    frames = FRAMES["style"]
