"""What a model is known to have learnt, where that can be told from its tokenizer: the digits and nothing else."""

import re

from ldm.conditioning.tokenizer import CLIP_MERGES, Tokenizer
from ldm.data.captions import NUMBER_WORDS, TRAIN_FRAMES, render


def knows_digits_alone(tokenizer: object) -> bool:
    """Whether the vocabulary was reduced to the digits' captions: its text encoder has learnt nothing else."""
    words = {part for frame in TRAIN_FRAMES for part in re.findall(r"[a-z]+", render(frame, "five"))}
    reduced = isinstance(tokenizer, Tokenizer) and len(tokenizer.merges) < CLIP_MERGES
    return reduced and all(len(tokenizer.encode(word)) == 1 for word in words)


def known_prompts(tokenizer: object) -> list[str]:
    """Prompts that cover what the model can draw; none where nobody can tell, as of Stable Diffusion."""
    return [f"a handwritten digit {word}" for word in NUMBER_WORDS] if knows_digits_alone(tokenizer) else []
