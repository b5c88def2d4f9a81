"""The tokenizer against transformers' CLIPTokenizer (5.23.0, which has one implementation) and open_clip's (3.3.0)."""

import gzip
import html
import importlib.util
import json
import pickle
import time
import unicodedata
from pathlib import Path

import ftfy
import pytest
import torch
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.conditioning.tokenizer import PLAIN_TEXT, Tokenizer, clip_merges, openclip_clean, reduce, without_surrogates

QUICK = settings(max_examples=200, deadline=None, derandomize=True)
CAPTIONS = ["a handwritten digit five", "a bold handwritten digit 7 leaning right", "the number zero, please"]

# Prompts on which the two libraries agree, and prompts on which they do not.
AGREED = [
    "a photo of a cat",
    "A Photo of a CAT!!!",
    "",
    "   \n\t ",
    "🎉👩‍👩‍👧 party",
    "café naïve résumé Ångström ñandú",
    "cafe\u0301",  # NFC joins the accent in both
    "日本語のテキスト مرحبا Привет",
    "it's we'll they've I'm he'd 'tis '''s",
    "1234 12.5% $5 a1b2",
    "word " * 500,
    "x" * 500,
    "!?" * 200,
    "under_score hy-phen <b>bold</b>",
]
DIFFERENT = [
    "don’t “quote” me",
    "&lt;b&gt; fish &amp;amp; chips &eacute;",
    "ﬁne oﬃce",
    "ＦＵＬＬ　ｗｉｄｔｈ１２",
    "con\x00trol\x07 cha\x1cracters\x7f \x1b[31mred",
    "<|endoftext|>",
    "a<|startoftext|>b <|endoftext|> c",
    "<start_of_text> a <END_OF_TEXT>",
    "ΟΔΟΣ ΣΑΣ",  # Python's lower() writes a final sigma, transformers' does not
]
ONE_SIDED = [
    "<|ENDOFTEXT|> in capitals",
    "!<start_of_text> x<end_of_text>y <end_of_text>>",
    "'ſ <ſtart_of_text> 'S",
    "İstanbul ẞ K Å",
    "schÃ¶n â€œmojibakeâ€\x9d",
    "zero\u200bwidth\u00adsoft \u2028line",
    "lone \ud800 surrogate",
    "a  b\r\nc\vd\fe",
]
PIECES = st.sampled_from([*AGREED[:8], *DIFFERENT, *ONE_SIDED, "&", ";", "#", "<", "'", "s", " "])
ANY_TEXT = st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=8).map("".join))


def vocabulary_file() -> list[str]:
    folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    with gzip.open(Path(folder) / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as lines:
        return lines.read().split("\n")


@pytest.fixture(scope="module")
def hugging(tmp_path_factory):
    """transformers' CLIPTokenizer from the two files of a hub folder, written from open_clip's package."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    vocabulary = dict(SimpleTokenizer().encoder)
    vocabulary["<|startoftext|>"] = vocabulary.pop("<start_of_text>")
    vocabulary["<|endoftext|>"] = vocabulary.pop("<end_of_text>")
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = ["#version: 0.2", *vocabulary_file()[1:48895]]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def open_clip():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@pytest.fixture(scope="module")
def clip():
    return Tokenizer(cleaning="clip")


@pytest.fixture(scope="module")
def openclip():
    return Tokenizer(cleaning="openclip")


def as_transformers(hugging, prompts, context_length=77):
    prompts = [without_surrogates(p) for p in prompts]  # which it refuses
    out = hugging(prompts, padding="max_length", truncation=True, max_length=context_length, return_tensors="pt")
    return out["input_ids"]


def test_the_vocabulary_is_clips(clip, openclip, open_clip):
    assert clip.vocab_size == 49408 and (clip.sot, clip.eos, clip.pad) == (49406, 49407, 49407)
    assert (openclip.sot, openclip.eos, openclip.pad) == (open_clip.sot_token_id, open_clip.eot_token_id, 0)
    names = [openclip.pipeline.id_to_token(i) for i in range(49408)]
    assert {name: i for i, name in enumerate(names)} == open_clip.encoder
    assert list(clip_merges()) == vocabulary_file()[1:48895]
    # diffusers' well-known example
    assert clip(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]


@pytest.mark.parametrize("context_length", [77, 16, 3])
def test_equals_transformers(clip, hugging, context_length):
    prompts = AGREED + DIFFERENT + ONE_SIDED
    ours = Tokenizer(clip.merges, context_length, "clip")(prompts)
    assert ours.dtype == torch.int64 and ours.shape == (len(prompts), context_length)
    assert torch.equal(ours, as_transformers(hugging, prompts, context_length))


@pytest.mark.parametrize("context_length", [77, 16, 3])
def test_equals_open_clip(openclip, open_clip, context_length):
    prompts = AGREED + DIFFERENT + ONE_SIDED
    ours = Tokenizer(openclip.merges, context_length, "openclip")(prompts)
    assert torch.equal(ours, open_clip(prompts, context_length))


def test_the_cleanings_agree_and_differ_where_the_libraries_do(clip, openclip):
    assert all(clip.encode(prompt) == openclip.encode(prompt) for prompt in AGREED)
    assert all(clip.encode(prompt) != openclip.encode(prompt) for prompt in DIFFERENT)


def test_literal_special_tokens(clip, openclip):
    assert clip.encode("<|endoftext|>") == [49407] and 49407 not in openclip.encode("<|endoftext|>")
    assert openclip.encode("<end_of_text>") == [49407] and 49407 not in clip.encode("<end_of_text>")
    assert clip(["a <|endoftext|> b"])[0, :6].tolist() == [49406, 320, 49407, 321, 49407, 49407]


@QUICK
@given(ANY_TEXT)
def test_any_text_equals_transformers(clip, hugging, text):
    assert torch.equal(clip([text]), as_transformers(hugging, [text]))


@QUICK
@given(ANY_TEXT.map(lambda text: "".join(c for c in text if unicodedata.category(c) != "Cn")))
def test_any_text_equals_open_clip(openclip, open_clip, text):
    # Without characters that Unicode had not assigned when Python 3.11 came out: whether such a one is a letter depends
    # on the release of `regex` that open_clip happens to find.
    assert torch.equal(openclip([text]), open_clip([text]))


@pytest.mark.parametrize("text", ["a red kite , 3 5", "café ☃", "", "it 's <b>"])
def test_ids_decode_to_their_text(clip, openclip, text):
    for tokenizer in (clip, openclip):
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer([text])[0])
    assert clip.decode(clip.encode(text)).split() == text.replace("<b>", "< b >").split()
    refused("token 49408 does not exist: this vocabulary has 0 to 49407", clip.decode, [49408])


def test_long_prompts_keep_the_end(clip, openclip):
    for tokenizer in (clip, openclip):
        row = tokenizer(["cat " * 500])[0]
        assert row[0] == 49406 and row[-1] == 49407 and (row[1:-1] == 2368).all()


def test_padding_can_be_chosen(clip):
    rows = Tokenizer(clip.merges, 6, "clip", pad=0)(["cat", "a cat"])
    assert rows.tolist() == [[49406, 2368, 49407, 0, 0, 0], [49406, 320, 2368, 49407, 0, 0]]
    assert Tokenizer(clip.merges, 4, "openclip", pad="eos")(["cat"]).tolist() == [[49406, 2368, 49407, 49407]]
    assert clip([]).shape == (0, 77)


def test_ids_can_be_framed_without_text(clip, openclip):
    for tokenizer in (clip, openclip):
        assert torch.equal(torch.from_numpy(tokenizer.frame([[320, 2368], []])), tokenizer(["a cat", ""]))


# open_clip's cleaning without ftfy


@QUICK
@given(st.lists(st.sampled_from([*(chr(i) for i in range(128)), "&amp;", "\x1b[1m"])).map("".join))
def test_plain_text_needs_no_ftfy(text):
    fixed = html.unescape(html.unescape(ftfy.fix_text(text)))
    if PLAIN_TEXT.fullmatch(text):
        assert fixed.split() == text.split()
    assert openclip_clean(text) == " ".join(fixed.split()).lower()


def test_every_pair_of_plain_characters_needs_no_ftfy():
    plain = [chr(i) for i in range(128) if PLAIN_TEXT.fullmatch(chr(i))]
    assert len(plain) == 95 - 1 + 4  # printable ASCII without "&"; tab, line feed, carriage return, form feed
    for first in plain:  # one long text per first character; ftfy works line by line
        text = "".join(f"{first}{second}a {first}{second} " for second in plain)
        assert html.unescape(html.unescape(ftfy.fix_text(text))).split() == text.split()


# Reduced vocabularies


@pytest.mark.parametrize("cleaning", ["clip", "openclip"])
def test_reduced_vocabulary_tokenizes_its_texts_alike(cleaning, clip):
    texts = CAPTIONS + AGREED + DIFFERENT
    merges = reduce(texts, merges_first=300, cleaning=cleaning)
    assert merges[:300] == list(clip.merges[:300]) and 300 < len(merges) < 1000
    ranks = [clip.merges.index(merge) for merge in merges]
    assert ranks == sorted(set(ranks))
    full, small = Tokenizer(cleaning=cleaning), Tokenizer(json.loads(json.dumps(merges)), cleaning=cleaning)
    assert (small.vocab_size, small.sot, small.eos) == (514 + len(merges), 512 + len(merges), 513 + len(merges))
    for text in texts:
        names = [full.pipeline.id_to_token(i) for i in full.encode(text)]
        assert [small.pipeline.id_to_token(i) for i in small.encode(text)] == names


@QUICK
@given(ANY_TEXT)
def test_any_prompt_tokenizes_without_loss_in_bytes_alone(text):
    byte = {name: i for i, name in enumerate(bytes_to_names())}
    words = Tokenizer([], cleaning="openclip")
    ids = words.encode(text)
    assert all(0 <= i < words.vocab_size for i in ids)
    names = [words.pipeline.id_to_token(i).removesuffix("</w>") for i in ids if i < 512]
    cleaned = openclip_clean(without_surrogates(text))
    if not any(name in cleaned for name in ("<start_of_text>", "<end_of_text>")):
        assert bytes(byte[name] for name in names) == cleaned.replace(" ", "").encode()


def bytes_to_names() -> list[str]:
    """GPT-2's printable name of each byte: itself where printable in Latin-1, else the next one from U+0100."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(i) if i in shown else chr(next(hidden)) for i in range(256)]


def test_reduced_ids_are_compact():
    merges = reduce(CAPTIONS)
    small = Tokenizer(merges, context_length=16)
    rows = small(CAPTIONS)
    assert rows.max() == small.eos == 514 + len(merges) - 1
    assert (rows.argmax(-1) == (rows == small.eos).int().argmax(-1)).all()  # open_clip pools at the highest id
    names = {small.pipeline.id_to_token(i) for i in small.encode(CAPTIONS[0])}
    assert names == {f"{word}</w>" for word in ("a", "handwritten", "digit", "five")}


def test_reduced_tokenizer_pickles():
    small = Tokenizer(reduce(CAPTIONS), 16)
    assert torch.equal(pickle.loads(pickle.dumps(small))(CAPTIONS), small(CAPTIONS))


def test_building_from_2000_merges_is_fast():
    merges = reduce([], 2000)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        Tokenizer(merges)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.03  # 3 ms on the machine this was written on


def test_imports_are_few(warm_python):
    """A plain prompt needs `tokenizers` alone; CLIP's own vocabulary is read without importing open_clip."""
    code = f"""
import sys
from ldm.conditioning.tokenizer import Tokenizer
assert "tokenizers" not in sys.modules
for cleaning in ("clip", "openclip"):
    Tokenizer({reduce(CAPTIONS)!r}, 16, cleaning)(["a handwritten digit five"])
    Tokenizer(cleaning=cleaning)(["a handwritten digit five"])
print([name for name in ("open_clip", "transformers", "ftfy", "regex", "torchvision") if name in sys.modules])
"""
    done = warm_python(code)
    assert done.stdout.strip() == "[]", done.stderr


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cleaning": "bert"}, "'bert' is unknown; it is one of clip, openclip"),
        ({"context_length": 1}, "context_length 1"),
        ({"pad": 600}, "pad 600"),
        ({"pad": -1}, "pad -1"),
        ({"pad": "zero"}, "pad 'zero'"),
        ({"merges": ["a b", "a b"]}, "twice"),
        ({"merges": ["x" * 10**7]}, r"merge 'x{99} \.\.\. x{49}' is not two parts with a space between$"),
        ({"merges": [5]}, "merge 5 is not two parts"),
        ({"merges": ["a " + "x" * 10**7]}, "^.{,300}$"),
        ({"merges": ["ab c"]}, "not a byte-pair list"),
        ({"merges": ["abc"]}, "merge .abc. is not two parts"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    refused(message, Tokenizer, **{"merges": ["a b"], **arguments})


def test_one_string_and_more_merges_than_there_are_are_refused():
    refused("a list of prompts", Tokenizer(["a b"]), "a cat")
    refused("merges_first 50000", reduce, [], 50_000)


def test_a_missing_vocabulary_is_named(monkeypatch):
    clip_merges.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("open_clip_torch", Tokenizer)
