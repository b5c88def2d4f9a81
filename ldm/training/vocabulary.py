"""The words that a text encoder trained together with the UNet begins with."""

from typing import Any

from ldm.conditioning.bert import WordPieceEncoder, vocabulary_of
from ldm.training.cache import captions_of
from ldm.training.conditions import train_conditioner
from ldm.training.denoising import DenoisingStage


def take_words(stage: DenoisingStage, dataset: Any) -> None:
    """Build a stage's text encoder on the words of the data set's captions, which a checkpoint then has.

    An encoder that has a vocabulary of its own, or is of another kind, stays as it is.
    """
    model = stage.latent_diffusion
    if not isinstance(model.cond_stage_model, WordPieceEncoder) or model.tokenizer is not None:
        return
    config: Any = model.cond_stage_config
    stage.vocabulary = vocab = vocabulary_of(captions_of(dataset))
    model.cond_stage_config = {**config, "params": {**config["params"], "vocab": vocab, "vocab_size": len(vocab)}}
    model.instantiate_cond_stage(model.cond_stage_config)
    train_conditioner(stage)
