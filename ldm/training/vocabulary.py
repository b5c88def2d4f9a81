"""The words that a text encoder trained together with the UNet begins with."""

from typing import Any

from ldm.conditioning.bert import WordPieceEncoder, vocabulary_of
from ldm.training.cache import captions_of
from ldm.training.conditions import rebuild_conditioner
from ldm.training.denoising import DenoisingStage


def take_words(stage: DenoisingStage, dataset: Any) -> None:
    """Build a stage's text encoder, which has no vocabulary yet, on the words of the data set's captions.

    A checkpoint then has them. An encoder of another kind stays as it is.
    """
    if isinstance(stage.latent_diffusion.cond_stage_model, WordPieceEncoder):
        stage.vocabulary = vocab = vocabulary_of(captions_of(dataset))
        rebuild_conditioner(stage, vocab=vocab, vocab_size=len(vocab))
