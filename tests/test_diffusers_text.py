"""The tokenizer's files, as transformers reads them."""

import hashlib

import pytest
import torch

from ldm.checkpoint.diffusers_text import CLIP_MERGES_SHA256, read_tokenizer, vocabulary
from ldm.checkpoint.diffusers_text_writer import write_tokenizer
from ldm.conditioning.tokenizer import Tokenizer, clip_merges, reduce

PROMPTS = ["a photo of a cat", "An astronaut, riding a horse: 4K (don't blink)"]
MERGES = reduce(PROMPTS, merges_first=50)
AWKWARD = [
    *(*PROMPTS, "", "  A   b\n c ", "word " * 100, "<b>bold</b> (x:1.3)"),
    *("it's we'll 1234 12.5% $5 a1b2 under_score hy-phen", "café naïve cafe\u0301 日本語 Привет 🎉"),
]


@pytest.mark.parametrize("files", ["all", "slow", "fast"])
@pytest.mark.parametrize("vocabulary", ["full", "reduced"])
@pytest.mark.parametrize("cleaning", ["clip", "openclip"])
def test_transformers_reads_our_tokenizer(tmp_path, files, vocabulary, cleaning):
    """From all files, from vocab.json and merges.txt alone, and from tokenizer.json alone."""
    from transformers import CLIPTokenizer

    ours = Tokenizer(merges=MERGES if vocabulary == "reduced" else None, context_length=24, cleaning=cleaning)
    write_tokenizer(tmp_path, ours.merges, ours.pad, ours.context_length)
    if files == "fast" and not (tmp_path / "tokenizer.json").exists():
        pytest.skip("transformers before 5 writes no tokenizer.json")
    for name in {"all": (), "slow": ("tokenizer.json",), "fast": ("vocab.json", "merges.txt")}[files]:
        (tmp_path / name).unlink(missing_ok=True)
    own = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert (own.model_max_length, own.pad_token_id) == (24, ours.pad)
    assert (own.bos_token_id, own.eos_token_id) == (ours.sot, ours.eos)
    ids = own(AWKWARD, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, ours(AWKWARD))
    merges, pad, size, added = read_tokenizer(tmp_path)
    assert (size, added) == (ours.vocab_size, {})
    assert pad == ours.pad and merges == (None if vocabulary == "full" else MERGES)


def test_an_exclamation_mark_is_the_pad_token_of_stable_diffusion_2(tmp_path):
    """The one prompt on which transformers and open_clip part, in every folder of Stable Diffusion 2: see there."""
    from transformers import CLIPTokenizer

    ours = Tokenizer(cleaning="openclip")
    write_tokenizer(tmp_path, ours.merges, ours.pad, ours.context_length)
    own = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert own("hi !")["input_ids"][2] == 0 and ours(["hi !"])[0, 2] == 256


def test_the_vocabulary_is_the_tokenizers():
    ours = Tokenizer()
    names = vocabulary(clip_merges())
    assert names == [ours.pipeline.id_to_token(i) for i in range(ours.vocab_size)]
    assert hashlib.sha256("\n".join(clip_merges()).encode()).hexdigest() == CLIP_MERGES_SHA256
