"""What a model is known to have learnt: digits, by a vocabulary reduced to their captions, and else nothing."""

import ldm
from ldm.conditioning.tokenizer import Tokenizer, reduce
from ldm.data.captions import Captioner
from ldm.finetune.known import known_prompts, knows_digits_alone


def test_the_model_that_ships_knows_the_digits():
    tokenizer = ldm.load(device="cpu").cond_stage_model.tokenizer
    prompts = known_prompts(tokenizer)
    assert len(prompts) == 10 and prompts[3] == "a handwritten digit three"


def test_a_vocabulary_tells():
    """Reduced to the digits' captions; to other words; CLIP's own; no tokenizer of CLIP's kind."""
    digits = Tokenizer(reduce(Captioner().texts()))
    assert knows_digits_alone(digits) and known_prompts(digits)
    for other in (Tokenizer(reduce(["a photo of a cat"])), Tokenizer(), object()):
        assert not knows_digits_alone(other) and known_prompts(other) == []
