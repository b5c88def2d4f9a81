"""BERT's tokenizer as transformers has it, and the text encoder on it."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from golden_fill import fill
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.conditioning.bert import BERT_SPECIAL, BERTEncoder, WordPiece, read_vocab
from ldm.conditioning.word_sum import WordSum
from ldm.models.transformer import BERTAttention

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789ßøæ.,:;!?'\"()-_/#&@日本語猫ñ"
WORDS = ["cat", "dog", "##s", "paint", "##ing", "##ed", "a", "of", "the", "five", "cafe", "un", "##want", "\u2028x"]
VOCAB = list(dict.fromkeys([*BERT_SPECIAL, *LETTERS, *("##" + letter for letter in LETTERS), *WORDS]))
PROMPTS = [
    "a painting of the CATS",
    "",
    "Café, naïve ÑANDÚ unwanted!!",
    "日本語の猫 and don't-stop",
    "tabs\tand\nnew\r\nlines\u00a0and\u200b\x00controls \ufffd",
    "straße STRASSE İstanbul ﬁve ①",
    "a [MASK] of [CLS] and [sep] [PAD]",
    "zzz " + "x" * 101,
    "😀 é vs e\u0301",
    "word " * 200,
]
ARGUMENTS = {"n_embed": 64, "n_layer": 2, "vocab_size": len(VOCAB), "max_seq_len": 16}


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def theirs(vocab_file):
    from transformers import BertTokenizerFast

    tokenizer = BertTokenizerFast.from_pretrained(str(vocab_file.parent), local_files_only=True)

    def tokenize(prompts, length):
        return tokenizer(prompts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")

    return lambda prompts, length: tokenize(prompts, length)["input_ids"]


@pytest.mark.parametrize("length", [2, 16, 77])
def test_tokens_are_those_of_transformers(theirs, vocab_file, length):
    ours = WordPiece(read_vocab(vocab_file), length)
    assert ours.max_length == length and ours(PROMPTS).dtype == torch.int64
    assert torch.equal(ours(PROMPTS), theirs(PROMPTS, length))


def test_tokens_are_those_of_transformers_for_any_text(theirs):
    ours = WordPiece(VOCAB, 24)

    @settings(deadline=None, max_examples=200)
    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
    def agree(text):
        assert torch.equal(ours([text]), theirs([text], 24))

    agree()


def test_what_the_tokens_are():
    """By hand: lower case, no accents, longest pieces first, [CLS] ... [SEP], [PAD]."""
    ours = WordPiece(VOCAB, 8)
    assert [VOCAB[i] for i in ours(["PAINTÍNGS Cafés"])[0]] == "[CLS] paint ##ing ##s cafe ##s [SEP] [PAD]".split()
    assert [VOCAB[i] for i in ours(["Ω cat [MASK]"])[0]][:5] == ["[CLS]", "[UNK]", "cat", "[MASK]", "[SEP]"]
    assert VOCAB[ours.sep] == "[SEP]"
    assert [VOCAB[i] for i in ours(["a a a a a a a a a"])[0]] == ["[CLS]", *"aaaaaa", "[SEP]"]
    assert torch.equal(ours(["a \ud800"]), ours(["a \ufffd"]))  # half a character, as a terminal may hand over


def test_a_vocabulary_file(tmp_path, vocab_file):
    assert read_vocab(vocab_file) == VOCAB
    crlf = tmp_path / "crlf.txt"
    crlf.write_bytes("\r\n".join(VOCAB).encode())
    assert read_vocab(crlf) == VOCAB
    refused("vocab.txt", read_vocab, tmp_path / "missing.txt", error=FileNotFoundError)
    (tmp_path / "other.txt").write_text("hello\nworld\n")
    refused(r"other.txt' is not BERT's: its 2 tokens lack \[PAD\]", read_vocab, tmp_path / "other.txt")
    (tmp_path / "twice.txt").write_text("\n".join([*BERT_SPECIAL, "cat", "dog", "cat"]))
    refused("1 of its 8 tokens appear twice", read_vocab, tmp_path / "twice.txt")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    refused("not UTF-8", read_vocab, tmp_path / "latin.txt")
    refused("max_length 1", WordPiece, VOCAB, 1)


@torch.no_grad()
def test_windows_of_attention():
    """Three heads see a token and the two after it, three it and the two before it, two all of them."""
    torch.manual_seed(0)
    layer, x = fill(BERTAttention(16, window=2), 3), torch.randn(1, 7, 16)
    q, k, v = (to(x)[0].view(7, 8, 64) for to in (layer.to_q, layer.to_k, layer.to_v))
    found = torch.zeros(7, 8, 64)
    for i, head in itertools.product(range(7), range(8)):
        first, last = (i, i + 3) if head < 3 else (max(i - 2, 0), i + 1) if head < 6 else (0, 7)
        weights = (k[first:last, head] @ q[i, head] / 8).softmax(0)
        found[i, head] = weights @ v[first:last, head]
    torch.testing.assert_close(layer(x)[0], layer.to_out(found.flatten(1)), atol=1e-5, rtol=1e-5)
    assert (layer(x) - fill(BERTAttention(16), 3)(x)).abs().max() > 0.01


@torch.no_grad()
def test_prompts_are_encoded_once_each():
    model = fill(BERTEncoder(**ARGUMENTS, vocab=VOCAB), 2)
    batches = []
    model.transformer.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    prompts = ["a cat", "", "a cat", "dogs"]
    (cond,) = model(prompts).values()
    assert batches == [3] and cond.shape == (4, 16, 64)
    want = model.transformer(model.tokenizer(prompts), return_embeddings=True)
    torch.testing.assert_close(cond, want, atol=1e-6, rtol=1e-5)
    assert (want[0] - want[3]).abs().max() > 0.1
    assert torch.equal(cond, model(model.tokenizer(prompts))["c_crossattn"])  # token ids
    assert torch.equal(cond, model(model.tokenizer(prompts).tolist())["c_crossattn"])
    assert torch.equal(cond, copy.deepcopy(model)(prompts)["c_crossattn"])
    assert model(torch.zeros(2, 5, dtype=torch.int32))["c_crossattn"].shape == (2, 5, 64)


def test_without_a_vocabulary():
    """Token ids are taken, and so is the empty prompt where its ids are known: those of bert-base-uncased."""
    model = BERTEncoder(8, 1)
    assert model.null == ""
    assert model.tokens(["", ""]).tolist() == 2 * [[101, 102, *75 * [0]]]
    refused(r"prompt 'a cat' cannot be read.*vocab.txt .*--vocab FILE", model, ["", "a cat"])
    small = BERTEncoder(**ARGUMENTS)
    assert small.null is None
    refused(rf"its {len(VOCAB)} tokens are not BERT's 30522: give token ids, from Python", small, [""])
    assert BERTEncoder(**ARGUMENTS, vocab=VOCAB).null == ""


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a cat", "a list of prompts, not one string"),
        (torch.zeros(2, 17, dtype=torch.long), r"\(2, 17\).*at most 16 tokens"),
        (torch.zeros(16, dtype=torch.long), r"\(16,\)"),
        (torch.zeros(2, 16), "torch.float32"),
        ([[1, 2], [3]], "rows of token ids of one length"),
        ([None], "rows of token ids"),
        (["a", 3], "rows of token ids"),
        ([[0, len(VOCAB)]], f"token id {len(VOCAB)} does not exist: this model has 0 to {len(VOCAB) - 1}"),
        ([[-1, 0]], "token id -1 does not exist"),
    ],
)
def test_bad_prompts_are_refused(prompts, message):
    refused(message, BERTEncoder(**ARGUMENTS, vocab=VOCAB), prompts)


def test_a_vocabulary_of_another_model_is_refused():
    refused(f"vocabulary has {len(VOCAB)} tokens and the model 30522", BERTEncoder, 8, 1, vocab=VOCAB)


def test_a_new_encoder_gives_each_word_its_own_vector():
    """Its layers add nothing yet: small models whose words are mixed from the start learn few of them."""
    encoder = BERTEncoder(96, 3, vocab_size=50, max_seq_len=32)
    tokens = torch.randint(0, 50, (2, 32))
    net = encoder.transformer
    x = net.token_emb(tokens) + net.pos_emb.emb.weight
    torch.testing.assert_close(encoder.encode(tokens), 4 * F.layer_norm(x, (96,)))
    loss = encoder.encode(tokens).square().sum(-1).matmul(torch.randn(32)).sum()
    grads = torch.autograd.grad(loss, [layer.to_out.weight for _, layer in net.attn_layers.layers[::2]])
    assert all(grad.abs().sum() > 0 for grad in grads)  # and they learn


def test_pooled_text_is_the_sum_of_a_prompts_vectors_over_the_root_of_their_number():
    for encoder in (
        fill(BERTEncoder(**ARGUMENTS, vocab=VOCAB, pooled=True), 2),
        WordSum(8, len(VOCAB), 16, VOCAB, True),
    ):
        prompts = ["cat", "cat dog of", ""]
        out = encoder(prompts)
        vectors, counts = out["c_crossattn"], [3, 5, 2] if isinstance(encoder, BERTEncoder) else [1, 1, 1]
        expected = torch.stack([row[:n].sum(0) / n**0.5 for row, n in zip(vectors, counts, strict=True)])
        torch.testing.assert_close(out["c_adm"], expected)
        assert not torch.allclose(expected[0], expected[1])
    assert set(BERTEncoder(**ARGUMENTS, vocab=VOCAB)(prompts)) == {"c_crossattn"}
