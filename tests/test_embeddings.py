"""Learned words: in files of every kind, and in models, which they leave as they were."""

import copy

import pickle_files
import pytest
import torch
from conftest import refused
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pickle_files import payloads, prepare, write_zip
from safetensors.torch import save_file
from tiny_stable_diffusion import KINDS, built, model_config
from torch import nn

import ldm
from ldm.conditioning.prompt import cut, encode_prompts
from ldm.conditioning.text import TextEncoder
from ldm.conditioning.tokenizer import Tokenizer, reduce
from ldm.conditioning.words import WordTokenizer, token_embedding
from ldm.finetune.embedding_files import LearnedWord, read_words, split_word, write_words
from ldm.finetune.embeddings import add_word, apply_embedding, check_new_word, initial_vectors
from ldm.latent_diffusion import LatentDiffusion
from ldm.util import instantiate_network

VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 0.05
EXACT = {"rtol": 0, "atol": 0}


def make(kind: str) -> LatentDiffusion:
    torch.manual_seed(0)
    return instantiate_network(model_config(copy.deepcopy(KINDS[kind]))).eval().requires_grad_(False)


@pytest.fixture(params=KINDS)
def model(request) -> LatentDiffusion:
    """A tiny model with either layout of the text encoder."""
    return make(request.param)


# --- in a model


def test_a_word_leaves_the_model_as_it_was(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prompts = ["a photo of a cat", "", "sks <sk s> <sks_>"]
    expected = model.condition(prompts)
    ldm.save(model, tmp_path / "before.safetensors")
    add_word(model, "<sks>", VECTORS)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert model.condition(prompts).keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.condition(prompts).items())
    assert [p.shape for p in model.parameters()] == [before[name].shape for name, _ in model.named_parameters()]
    ldm.save(model, tmp_path / "after.safetensors")
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()


def test_its_vectors_stand_where_the_word_stands(model):
    """The states of the prompt are those of its embedded tokens, with the vectors put in by hand."""
    encoder = model.cond_stage_model
    base = encoder.tokenizer
    add_word(model, "<one>", VECTORS[:1])
    add_word(model, "<sks>", VECTORS)
    found = model.condition(["a <sks>, cat <One>"], plain=True)["c_crossattn"]
    a, comma, cat = (base.encode(text) for text in ("a", ",", "cat"))
    x = token_embedding(encoder).weight[base.frame([[*a, 0, 0, 0, *comma, *cat, 0]])[0]][None].clone()
    at = 1 + len(a)
    x[0, at : at + 3] = VECTORS
    x[0, at + 3 + len(comma) + len(cat)] = VECTORS[0]
    tower = encoder.tower
    positions = torch.arange(x.shape[1])
    transformers = encoder.layout == "transformers"
    x = x + (tower.text_model.embeddings.position_embedding(positions) if transformers else tower.positional_embedding)
    for block in list(tower.blocks())[: encoder.state]:
        x = block(x)
    torch.testing.assert_close(found, tower.final_norm(x), **EXACT)


def test_words_in_weighted_and_long_prompts(model):
    add_word(model, "<sks>", VECTORS)
    encoder = model.cond_stage_model
    plain = model.condition(["a <sks> cat"])["c_crossattn"]
    torch.testing.assert_close(model.condition(["a (<sks>:1.0) cat"])["c_crossattn"], plain, **EXACT)
    weighted = encode_prompts(encoder, ["a (<sks>:1.3) cat"])["c_crossattn"]
    share = weighted / plain  # (1, n, d): the same for all numbers of a token, but for the common factor
    others = [0, 1, *range(5, plain.shape[1])]
    torch.testing.assert_close(share[0, 2:5] / share[0, :1], torch.full_like(share[0, 2:5], 1.3), rtol=1e-4, atol=0)
    torch.testing.assert_close(share[0, others], share[0, :1].expand(len(others), -1), rtol=1e-4, atol=0)
    long = encode_prompts(encoder, ["a cat " * 12 + "BREAK <sks>"])["c_crossattn"]
    n = encoder.tokenizer.context_length
    torch.testing.assert_close(long[:, -n:], model.condition(["<sks>"])["c_crossattn"], rtol=1e-5, atol=1e-5)


def test_a_word_of_several_vectors_is_not_cut_between_chunks(model):
    """It begins the next chunk, whole; two that touch may be parted between them; of all room's length it fits."""
    tokenizer = model.cond_stage_model.tokenizer
    room = tokenizer.context_length - 2
    add_word(model, "<three>", VECTORS)
    add_word(model, "<whole>", torch.zeros(room, 32))
    tokenizer = model.cond_stage_model.tokenizer
    three, whole, (cat,) = tokenizer.encode("<three>"), tokenizer.encode("<whole>"), tokenizer.encode("cat")
    for before in range(room - 3, room + 1):
        first, second = cut(tokenizer, "cat " * before + "<three> cat")
        fits = before + 3 <= room
        assert first.tokens == [cat] * before + (three if fits else [])
        assert second.tokens == ([] if fits else three) + [cat] and len(second.weights) == len(second.tokens)
    parts = cut(tokenizer, "cat " * (room - 3) + "<three><three>(cat:1.2)")
    assert [part.tokens for part in parts] == [[cat] * (room - 3) + three, [*three, cat]]
    assert [part.tokens for part in cut(tokenizer, "cat <whole> cat")] == [[cat], whole, [cat]]


MERGES = reduce(["a photo of a cat and a dog"], merges_first=100)
TEXTS = st.text(st.characters(codec=None) | st.sampled_from(" <>sks_*,'é\ud83d\ude00\n"), max_size=20)


@pytest.mark.parametrize("cleaning", ["clip", "openclip"])
def test_all_other_text_is_tokenized_as_before(cleaning):
    base = Tokenizer(MERGES, 24, cleaning)
    words = WordTokenizer(base)
    words.add("<sks>", 3)
    words.add("zqx7", 1)
    first = base.vocab_size

    @settings(max_examples=300, deadline=None)
    @given(TEXTS, TEXTS)
    def check(before, after):
        assume(not words.found.search(before) and not words.found.search(after))
        assert words.encode(before) == base.encode(before)
        ids = words.encode(f"{before} <sks> {after} zqx7")
        # with their spaces: ftfy may take one for a part of a damaged character
        expected = [*base.encode(f"{before} "), first, first + 1, first + 2, *base.encode(f" {after} "), first + 3]
        assert ids == expected
        assert torch.equal(words([before, after]), base([before, after]))

    check()
    for text in ("azqx7", "zqx78", "zqx7_", "ézqx7", "<sk s>", "sks"):  # parts of other words
        assert words.encode(text) == base.encode(text), text
    assert words.encode("ZQX7.") == [first + 3, *base.encode(".")]
    assert words.encode("a<SKS>b") == [*base.encode("a"), first, first + 1, first + 2, *base.encode("b")]


def test_of_two_words_that_begin_alike_the_longer_is_meant():
    words = WordTokenizer(Tokenizer(MERGES, 24))
    words.add("<s", 1)
    words.add("<s>", 2)
    first = words.vocab_size
    ids = [first + 1, first + 2, first]
    assert words.encode("<s> <s") == ids and words.decode(ids) == "<s> <s"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("", "visible characters"),
        (" a", "visible characters"),
        ("a\x00b", "visible characters"),
        ("a BREAK b", "visible characters, and without BREAK"),
        ("<Known>", "'<Known>' is already a learned word"),
        ("my word", "new word: spaces, brackets and backslashes"),
        ("[V]", "syntax in prompts"),
        ("a\\b", "syntax in prompts"),
        ("cat", r"'cat' is a word that the text encoder has already \(token \d+\): .* such as '<cat>'"),
    ],
)
def test_a_word_that_cannot_be_one(model, word, sentence):
    """The last four only where it is to be trained: files are called as they are."""
    add_word(model, "<known>", VECTORS)
    encoder = model.cond_stage_model
    refused(sentence, *((check_new_word, encoder, word) if "new" in sentence or "syntax" in sentence or "already (" in
                        sentence or "token" in sentence else (add_word, model, word, VECTORS)))  # fmt: skip
    assert list(model.cond_stage_model.tokenizer.words) == ["<known>"]


@pytest.mark.parametrize(
    ("name", "prompts", "others"),
    [
        ("cat", ["a cat", "Cat, a"], ["a concatenation", "cats"]),  # a token of the vocabulary
        ("@", ["a @ b", "me@here"], ["a at b"]),
        ("bad hands", ["a bad hands", "Bad \n hands"], ["badhands"]),
        ("style (v2) [x]", [r"a style \(v2\) \[x\]"], ["a style (v2) [x]", "style v2 x"]),
        ("caf\u00e9", ["a caf\u00e9", "cafe\u0301"], ["a cafe"]),
        ("cafe\u0301", ["a caf\u00e9", "cafe\u0301"], ["a cafe"]),  # as macOS writes names
        ("cafe", ["a cafe"], ["caf\u00e9", "cafe\u0301"]),
    ],
)
def test_a_file_is_called_by_its_name_whatever_that_is(model, tmp_path, name, prompts, others):
    tokenizer = model.cond_stage_model.tokenizer
    known = len(tokenizer.encode(name)) == 1
    write_words(tmp_path / f"{name}.pt", LearnedWord("inside", VECTORS), "a1111")
    (word,) = apply_embedding(model, tmp_path / f"{name}.pt")
    words = model.cond_stage_model.tokenizer
    first = tokenizer.vocab_size

    def learned(prompt):
        return {first, first + 1, first + 2} <= {token for chunk in cut(words, prompt) for token in chunk.tokens}

    assert all(map(learned, prompts)) and not any(map(learned, others)), word
    assert [note for note in model.notes if "it now means the learned word" in note] == model.notes[:-1] * known
    assert "(inside it is called 'inside')" in model.notes[-1]


def test_a_file_and_the_word_that_it_is_to_be(tmp_path):
    for name in ("a.pt", "a=b.pt"):
        (tmp_path / name).write_bytes(b"")
    file, other = tmp_path / "a.pt", tmp_path / "a=b.pt"
    assert split_word(str(file)) == (file, None) and split_word(str(other)) == (other, None)
    assert split_word(f"{file}=<a=b>") == (file, "<a=b>") and split_word(f"{other}=c") == (other, "c")
    assert split_word(str(tmp_path / "none.pt")) == (tmp_path / "none.pt", None)
    assert split_word(f"{tmp_path}/none.pt=x") == (tmp_path / "none.pt", "x")


def test_vectors_of_another_text_encoder(model, tmp_path, tiny_model):
    write_words(tmp_path / "sd1.pt", LearnedWord("<sks>", torch.zeros(2, 768)), "a1111")
    with pytest.raises(ValueError, match=r"sd1.pt.* 768 numbers each \(as Stable Diffusion 1's\).* takes 32 numbers"):
        apply_embedding(model, tmp_path / "sd1.pt")
    with pytest.raises(ValueError, match="'<sks>' has 23 vectors, and a prompt of this model has room for 22"):
        add_word(model, "<sks>", torch.zeros(23, 32))
    assert not isinstance(model.cond_stage_model.tokenizer, WordTokenizer)
    other = built(model_config(KINDS["sd1"]), make("sd1").state_dict())
    other.cond_stage_model = None
    refused("conditioned by nothing", add_word, other, "<sks>", VECTORS)


def test_what_to_start_from(model):
    encoder = model.cond_stage_model
    weight = token_embedding(encoder).weight
    one, two = encoder.tokenizer.encode("cat riding")
    assert torch.equal(initial_vectors(encoder, "cat riding"), weight[[one, two]])
    assert torch.equal(initial_vectors(encoder, "cat riding", 5), weight[[one, one, one, two, two]])
    for text, count in (("", None), ("cat riding", 1)):
        refused("initial words", initial_vectors, encoder, text, count)


def test_half_precision_and_gradients(model):
    """The vectors keep their precision, and alone get gradients."""
    vectors = nn.Parameter(VECTORS.clone())
    add_word(model, "<sks>", vectors)
    encoder: TextEncoder = model.cond_stage_model.to(torch.bfloat16)
    states = encoder(["a <sks>"])["c_crossattn"]
    assert states.dtype == torch.bfloat16 and vectors.dtype == torch.float32
    states.float().square().sum().backward()
    assert (vectors.grad.abs().sum(1) > 0).all() and all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@torch.no_grad()
def test_words_among_the_tokens_of_a_pipeline(tmp_path, kind, capsys):
    """A pipeline as diffusers' textual_inversion.py saves it, with rows for its tokens, gives the same text states."""
    from diffusers import StableDiffusionPipeline

    model = make(kind)
    ldm.save(model, tmp_path / "folder", format="diffusers")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", safety_checker=None)
    tokens = ["<sks>", "<sks>_1", "<sks>_2", "<one>"]  # of a word of three vectors, and of one
    assert theirs.tokenizer.add_tokens(tokens) == 4
    theirs.text_encoder.resize_token_embeddings(len(theirs.tokenizer))
    first = theirs.tokenizer.convert_tokens_to_ids("<sks>")
    rows = theirs.text_encoder.get_input_embeddings().weight
    rows[first : first + 3], rows[first + 3] = VECTORS, VECTORS[0]
    theirs.save_pretrained(tmp_path / "learned")
    found = ldm.load(tmp_path / "learned", device="cpu")
    assert "learned words among its tokens: <sks> <one>" in found.notes and found.changes == []
    assert torch.equal(*(token_embedding(one.cond_stage_model).weight for one in (found, model)))
    for prompt, said in (("a <sks> cat, <one>", "a <sks> <sks>_1 <sks>_2 cat, <one>"), ("a cat", "a cat")):
        ids = theirs.tokenizer([said], padding="max_length", max_length=24, return_tensors="pt").input_ids
        expected = theirs.text_encoder(ids)[0]
        torch.testing.assert_close(found.cond_stage_model([prompt])["c_crossattn"], expected, rtol=1e-4, atol=1e-5)
    assert "<sks> <one>" in ldm.save(found, tmp_path / "back.safetensors")[0]  # which is without them
    refused("'<one>' is already a learned word", add_word, found, "<one>", VECTORS)


# --- in files


@pytest.mark.parametrize(
    ("name", "format", "word"),
    [
        ("learned_embeds.safetensors", "diffusers", "<sks>"),
        ("learned_embeds.bin", "diffusers", "<sks>"),
        ("mine.pt", "a1111", "mine"),
        ("embeddings.pt", "compvis", "embeddings"),
    ],
)
def test_files_come_back_as_they_were(tmp_path, name, format, word):
    write_words(tmp_path / name, LearnedWord("<sks>", VECTORS[1:], step=7), format)
    (found,) = read_words(tmp_path / name)
    assert (found.word, found.step) == (word, 7 if format == "a1111" else None)
    assert found.inside == (None if word == "<sks>" else "<sks>")
    torch.testing.assert_close(found.vectors, VECTORS[1:], **EXACT)
    assert read_words(tmp_path / name, "<other>")[0].word == "<other>"
    assert (tmp_path / name).stat().st_size < 4000  # the vectors, and not all that they were cut from


def test_files_are_what_their_own_programs_read(tmp_path):
    """The keys and kinds that AUTOMATIC1111's, CompVis's and diffusers' code look up, read by torch itself."""
    word = LearnedWord("<sks>", VECTORS, 7)
    write_words(tmp_path / "sks.pt", word, "a1111")
    found = torch.load(tmp_path / "sks.pt", weights_only=True)
    assert found["string_to_token"] == {"*": 265} and found["name"] == "<sks>" and found["step"] == 7
    assert torch.equal(found["string_to_param"]["*"], VECTORS)
    assert Tokenizer().encode("*") == [265]
    write_words(tmp_path / "embeddings.pt", word, "compvis")
    found = torch.load(tmp_path / "embeddings.pt", weights_only=False)
    assert found["string_to_token"]["*"] == 265 and isinstance(found["string_to_param"], nn.ParameterDict)
    assert torch.equal(found["string_to_param"]["*"], VECTORS)
    write_words(tmp_path / "sks.safetensors", word, "a1111")
    (found,) = read_words(tmp_path / "sks.safetensors")
    assert found.word == "sks" and torch.equal(found.vectors, VECTORS)  # the format has no place for a name
    refused("format 'other' is unknown", write_words, tmp_path / "sks.pt", word, "other")


def test_other_shapes_of_the_same_formats(tmp_path):
    """CompVis's files of several words, one vector without its dimension, half precision, files before zip."""
    several = nn.ParameterDict({"<a>": nn.Parameter(VECTORS), "<b>": nn.Parameter(VECTORS[:1])})
    content = {"string_to_token": {"<a>": torch.tensor(5), "<b>": torch.tensor(6)}, "string_to_param": several}
    for legacy in (False, True):
        torch.save(content, tmp_path / "two.pt", _use_new_zipfile_serialization=legacy)
        a, b = read_words(tmp_path / "two.pt")
        assert (a.word, b.word) == ("<a>", "<b>") and torch.equal(a.vectors, VECTORS)
        assert torch.equal(b.vectors, VECTORS[:1])
    refused(r"it holds 2 words \(<a>, <b>\), which cannot all be called '<c>'", read_words, tmp_path / "two.pt", "<c>")
    torch.save({"<a>": VECTORS[0].half()}, tmp_path / "learned_embeds.bin")
    (found,) = read_words(tmp_path / "learned_embeds.bin")
    assert torch.equal(found.vectors, VECTORS[:1].half().float())
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": None}, tmp_path / "stem.pt")
    assert read_words(tmp_path / "stem.pt")[0].word == "stem"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "Stable Diffusion XL"),
        ({"conv.weight": torch.zeros(2, 2)}, "no learned words, but 'conv.weight'"),
        ({"<a>": torch.zeros(2, 2, 2)}, "no learned words, but '<a>'"),
        ({"<a>": torch.zeros(2, dtype=torch.long)}, "no learned words"),
        ({"<a>": torch.full((2, 2), float("nan"))}, "not finite"),
        ({"<a>": torch.zeros(0, 4)}, "empty"),
    ],
)
def test_files_that_hold_no_words(tmp_path, content, sentence):
    torch.save(content, tmp_path / "a.pt")
    save_file(content, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        refused(f"{name}' cannot be read: .*{sentence}", read_words, tmp_path / name)
    torch.save([1], tmp_path / "list.pt")
    refused("no learned words, but no tensors", read_words, tmp_path / "list.pt")
    refused("missing.pt", read_words, tmp_path / "missing.pt", error=FileNotFoundError)


def test_nothing_in_a_file_is_run(tmp_path):
    """Whatever runs code in Python's own unpickler, beside the vectors, among them and in their place."""
    prepare(tmp_path)
    pickle_files.register_extensions()
    try:
        for what, value in payloads(tmp_path).items():
            pickle_files.FIRED.clear()
            vectors = pickle_files.tensor()
            for content in (
                pickle_files.mapping(string_to_param=pickle_files.mapping(**{"*": vectors, "b": value})),
                pickle_files.mapping(string_to_param=value, string_to_token=vectors),
                pickle_files.mapping(**{"<a>": vectors, "name": value}),
            ):
                path = write_zip(tmp_path / "evil.pt", content)
                try:
                    found = read_words(path)
                except ValueError:
                    continue
                finally:
                    assert not (tmp_path / "hit").exists() and not pickle_files.FIRED, what
                assert len(found) == 1 and found[0].vectors.shape == (2, 3), what
    finally:
        pickle_files.forget_extensions()


# --- against diffusers


@pytest.mark.parametrize(("kind", "format"), [("sd1", "diffusers"), ("sd1", "a1111"), ("sd2", "diffusers")])
@torch.no_grad()
def test_texts_are_encoded_as_by_diffusers(tmp_path, kind, format):
    """The same file, loaded by diffusers' load_textual_inversion into the same model, gives the same text states."""
    from diffusers import StableDiffusionPipeline

    model = make(kind)
    ldm.save(model, tmp_path / "folder", format="diffusers")
    write_words(tmp_path / "sks.pt", LearnedWord("<sks>", VECTORS), format)
    assert apply_embedding(model, tmp_path / "sks.pt", "<sks>") == ["<sks>"]  # diffusers reads the name inside
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", safety_checker=None)
    theirs.load_textual_inversion(str(tmp_path / "sks.pt"))
    prompts = ["a photo of a <sks>", "<sks>, riding a horse", "a photo of a cat"]
    for prompt in prompts:
        expected, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
        found = model.condition([prompt], plain=True)["c_crossattn"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (model.condition(prompts[:1])["c_crossattn"] - model.condition(["a photo of a"])["c_crossattn"]).std() > 0.01
