"""Style accuracy: is the stroke weight and slant that a caption asked for measured on the image?"""

from collections.abc import Sequence

from torch import Tensor

from ldm.data.captions import Caption
from ldm.data.measure import SLANTS, STROKE_WEIGHTS, Thresholds, classify_styles
from ldm.evaluation.prompt import accuracy, accuracy_by


def style_accuracy(images: Tensor, captions: Sequence[Caption], thresholds: Thresholds) -> dict:
    """Share of stated classes found on uint8 images (n, 28, 28), measured exactly as the training captions' were.

    `stated` counts each statement, `captions` each caption that states any (and wants all of them found); `weight`
    and `slant` are the statements of each kind, with their classes. Captions that state nothing do not count.
    """
    found = classify_styles(images, thresholds)
    kinds = {"weight": (found.weight.tolist(), STROKE_WEIGHTS), "slant": (found.slant.tolist(), SLANTS)}
    report: dict = {}
    statements: list[bool] = []
    whole = [True] * len(captions)
    for kind, (classes, names) in kinds.items():
        asked = [
            (i, getattr(caption, kind)) for i, caption in enumerate(captions) if getattr(caption, kind) is not None
        ]
        right = [classes[i] == wanted for i, wanted in asked]
        for (i, _), answer in zip(asked, right, strict=True):
            whole[i] = whole[i] and answer
        by_class = accuracy_by([wanted for _, wanted in asked], right)
        report[kind] = {**accuracy(right), "per_class": {names[int(key)]: value for key, value in by_class.items()}}
        statements += right
    stating = [
        answer
        for answer, caption in zip(whole, captions, strict=True)
        if (caption.weight, caption.slant) != (None, None)
    ]
    return {"stated": accuracy(statements), "captions": accuracy(stating), **report}
