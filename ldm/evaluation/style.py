"""Style accuracy: does the image have the stroke weight and slant that its caption states?"""

from collections.abc import Sequence

from torch import Tensor

from ldm.data.captions import Caption
from ldm.data.measure import SLANTS, STROKE_WEIGHTS, Thresholds, classify_styles
from ldm.evaluation.prompt import accuracy, accuracy_by


def style_accuracy(images: Tensor, captions: Sequence[Caption], thresholds: Thresholds) -> dict:
    """Return the share of stated classes found on uint8 images (n, 28, 28), measured as for the training captions.

    `stated` counts each statement, `captions` each caption that states any (all of them must be found); `weight` and
    `slant` are the statements of each kind, with their classes. Captions that state nothing do not count.
    """
    found = classify_styles(images, thresholds)
    report: dict = {}
    answers: dict[int, list[bool]] = {}  # caption -> whether each of its statements is right
    for kind, names in (("weight", STROKE_WEIGHTS), ("slant", SLANTS)):
        stated = {i: value for i, caption in enumerate(captions) if (value := getattr(caption, kind)) is not None}
        classes = getattr(found, kind).tolist()
        right = [classes[i] == value for i, value in stated.items()]
        per_class = accuracy_by(list(stated.values()), right)
        report[kind] = {**accuracy(right), "per_class": {names[int(key)]: value for key, value in per_class.items()}}
        for i, answer in zip(stated, right, strict=True):
            answers.setdefault(i, []).append(answer)
    statements = [answer for several in answers.values() for answer in several]
    return {"stated": accuracy(statements), "captions": accuracy([all(a) for a in answers.values()]), **report}
