"""Prompt syntax, chunks, weights and clip-skip: against written-out values, closed forms and transformers."""

import math
import re

import pytest
import torch
from conftest import refused
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ldm
from ldm.conditioning.prompt import MAX_CHUNKS, count_chunks, cut, encode_prompts
from ldm.conditioning.prompt_syntax import Piece, parse_prompt, weigh
from ldm.conditioning.text import TextEncoder
from ldm.conditioning.tokenizer import Tokenizer, reduce
from ldm.models.kernels import attention

QUICK = settings(max_examples=300, deadline=None, derandomize=True)
WORDS = "a cat, dog; house; the red brick wall"
MERGES = reduce([WORDS], cleaning="openclip")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # float32, features of order 1
BYTES = Tokenizer([], 77, "openclip")  # "a" and "," are one token each, as is every word of one letter
A, B, COMMA = (BYTES.encode(text)[0] for text in ("a", "b", ","))


def encoder(layout="openclip", **changes):
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 3, "heads": 4, "context_length": 16, "vocab_size": 514 + len(MERGES)}
    arguments = {**sizes, "tokenizer": {"merges": MERGES}, **changes}
    return TextEncoder(layout=layout, activation="gelu", **arguments).eval().requires_grad_(False)


def spied(table, context_length=6):
    """A text encoder whose hidden state is a token's row of the table, at every place; its tokens are bytes."""
    sizes = {"context_length": context_length, "vocab_size": 514, "width": table.shape[1], "heads": 1}
    model = encoder(**sizes, tokenizer={"merges": []})
    model.tower.hidden_states = lambda tokens, depth: [table[tokens]] * (depth + 1)
    model.tower.final_norm = lambda x: x
    return model


# Syntax


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", []),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("((a))", [("a", 1.1 * 1.1)]),
        ("(a:1.3)", [("a", 1.3)]),
        ("(a : +.5 )", [("a ", 0.5)]),
        ("(a:-1.)", [("a", -1.0)]),
        ("(a:1e1)", [("a", 10.0)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("(a (b:2) c:3)", [("a ", 3.0), ("b", 6.0), (" c", 3.0)]),
        (r"\(literal\] \\ \[x\)", [(r"(literal] \ [x)", 1.0)]),
        (r"(a\)b)", [("a)b", 1.1)]),
        (r"a\b\n", [("abn", 1.0)]),  # a backslash before another character is dropped
        ("(un)(necessary)", [("unnecessary", 1.1)]),
        ("()[](:2)", []),
        # not balanced
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a ((b c", [("a ", 1.0), ("b c", 1.1 * 1.1)]),
        ("a [b", [("a ", 1.0), ("b", 1 / 1.1)]),
        ("a) b] c:2)", [("a) b] c:2)", 1.0)]),
        ("[a:2)", [("a:2)", 1 / 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 * (1 / 1.1)), (" c", 1 / 1.1)]),
        # a colon or number that is none
        ("1:2, a:b", [("1:2, a:b", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(wait:...)", [("wait:...", 1.1)]),
        ("[a:0.5]", [("a:0.5", 1 / 1.1)]),
        ("a BREAK b", [("a ", 1.0), None, (" b", 1.0)]),
        ("BREAK BREAK", [None, (" ", 1.0), None]),
        ("(a BREAK b:2) c", [("a ", 2.0), None, (" b", 2.0), (" c", 1.0)]),
        ("a BREAKFAST, break", [("a BREAKFAST, break", 1.0)]),
        # A1111's own example: three levels, a weight inside
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1)]
            + [("sky", 1.4641), (".", 1.1)],
        ),
    ],
)
def test_syntax(prompt, pieces):
    have = [piece for section in parse_prompt(prompt) for piece in (None, *section)][1:]  # None: BREAK
    assert [piece and piece.text for piece in have] == [piece and piece[0] for piece in pieces]
    weights = [piece[1] for piece in pieces if piece is not None]
    assert [piece.weight for piece in have if piece is not None] == pytest.approx(weights, rel=1e-15)


SENTENCE = r"the weight \S+ of .* must be from -1000 to 1000; round brackets .* for the characters"


@pytest.mark.parametrize("prompt", ["(a:1e400)", "(a:-1e400)", "(a:nan)", "(a:inf)", "((a:999):999)", "((a:1e400):0)"])
def test_weights_that_cannot_be_meant(prompt):
    refused(SENTENCE, parse_prompt, prompt)


def test_a_weight_is_refused_only_where_it_acts():
    assert parse_prompt("((a:5000):0.1)") == [[Piece("a", 500.0)]]
    assert parse_prompt("(BREAK:1e400) a") == [[], [Piece(" a", 1.0)]]


SYNTAX = st.sampled_from([*"()[]\\:., ", "BREAK", "1.3", "1e400", "nan", "-2", "a", "cat"])


@QUICK
@given(st.one_of(st.text(), st.lists(SYNTAX, max_size=30).map("".join)))
@example("(" * 300 + "a" + "]" * 300)
@example("[" * 20000)
def test_no_text_breaks_the_parser(prompt):
    try:
        sections = parse_prompt(prompt)
    except ValueError as error:
        assert re.fullmatch(SENTENCE, str(error), re.DOTALL)
        return
    pieces = [piece for section in sections for piece in section]
    assert all(text and math.isfinite(weight) for text, weight in pieces)
    if not set(prompt) & set("()[]\\") and "BREAK" not in prompt:
        assert pieces == ([Piece(prompt, 1.0)] if prompt else [])
    if ":" not in prompt:  # no weights, so that nothing but brackets, backslashes and BREAK may be lost
        kept = "".join(text for text, _ in pieces)
        assert re.sub(r"[()\[\]\\]", "", kept) == re.sub(r"[()\[\]\\]|\bBREAK\b", "", prompt)


FACTOR = {"%s": 1.0, "(%s)": 1.1, "[%s]": 1 / 1.1, "(%s:1.5)": 1.5, "(%s:0.25)": 0.25, "( %s : -2.0 )": -2.0}
TREES = st.recursive(
    st.text(st.sampled_from("ab ()[]\\,.5"), max_size=5),
    lambda inner: st.tuples(st.sampled_from(list(FACTOR)), st.lists(inner, max_size=3)),
    max_leaves=10,
)


def written(tree) -> str:
    """The prompt of a tree: a text, or (brackets, trees)."""
    if isinstance(tree, str):
        return re.sub(r"([()\[\]\\])", r"\\\1", tree)
    return tree[0] % "".join(map(written, tree[1]))


def letters(tree, weight=1.0) -> list[tuple[str, float]]:
    """Each character of a tree with the product of the brackets around it."""
    if isinstance(tree, str):
        return [(c, weight) for c in tree if c != " "]
    return [pair for branch in tree[1] for pair in letters(branch, weight * FACTOR[tree[0]])]


@QUICK
@given(st.lists(TREES, max_size=4).map(lambda trees: ("%s", trees)))
def test_every_nesting_is_the_product_of_its_brackets(tree):
    want = letters(tree)
    (section,) = parse_prompt(written(tree))
    have = [(c, piece.weight) for piece in section for c in piece.text if c != " "]
    assert [c for c, _ in have] == [c for c, _ in want]
    assert [w for _, w in have] == pytest.approx([w for _, w in want], rel=1e-12)


# Chunks


def tokens_of(chunks):
    return [chunk.tokens for chunk in chunks]


def test_chunks_of_75():
    assert tokens_of(cut(BYTES, "")) == [[]]
    assert tokens_of(cut(BYTES, "a " * 75)) == [[A] * 75]
    assert tokens_of(cut(BYTES, "a " * 200)) == [[A] * 75, [A] * 75, [A] * 50]


def test_cuts_move_back_to_a_comma():
    # 74: the last token of the chunk; 55: 19 tokens move, the most; 75: finds no room, so it begins the next chunk
    for commas, first in (([74], 75), ([60], 61), ([55], 56), ([54], 75), ([56, 60, 80], 61), ([60, 75], 75)):
        tokens = [COMMA if i in commas else A for i in range(100)]
        prompt = " ".join("," if token == COMMA else "a" for token in tokens)
        assert tokens_of(cut(BYTES, prompt)) == [tokens[:first], tokens[first:]]


def stepwise(words, room, reach):
    """The same rule token by token: one that finds no room takes along what stands after a near comma."""
    done, now, comma = [], [], None
    for word in words:
        if word == "BREAK":
            done, now, comma = [*done, now], [], None
            continue
        moved = []
        if len(now) == room:
            if word != COMMA and comma is not None and room - comma <= reach:
                now, moved = now[: comma + 1], now[comma + 1 :]
            done, now, comma = [*done, now], moved, None
        if word == COMMA:
            comma = len(now)
        now = [*now, word]
    return [*done, now] if now or not done else done


@QUICK
@given(st.lists(st.sampled_from([A, A, A, B, COMMA, "BREAK"]), max_size=60), st.sampled_from([(22, 5), (4, 1)]))
def test_cuts_are_the_stepwise_rule(words, sizes):
    room, reach = sizes  # reach: 20 of 75 tokens, in proportion
    prompt = " ".join({A: "a", B: "b", COMMA: ","}.get(word, word) for word in words)
    assert tokens_of(cut(Tokenizer([], room + 2, "openclip"), prompt)) == stepwise(words, room, reach)


def test_break_begins_a_chunk():
    chunks = {
        "a BREAK b": [[A], [B]],
        "a BREAK": [[A]],  # nothing follows
        "BREAK a": [[], [A]],
        "BREAK": [[]],
        "a BREAK BREAK b": [[A], [], [B]],
        "a " * 75 + "BREAK b": [[A] * 75, [B]],
        "a " * 76 + "BREAK b": [[A] * 75, [A], [B]],
    }
    assert {prompt: tokens_of(cut(BYTES, prompt)) for prompt in chunks} == chunks


def test_weights_follow_their_tokens():
    (chunk,) = cut(BYTES, "a (b a:2) [b]")
    assert chunk == ([A, B, A, B], [1.0, 2.0, 2.0, 1 / 1.1])
    first, second = cut(BYTES, "a (" + "a " * 79 + ":0.5)")
    assert (first.weights, second.weights) == ([1.0] + [0.5] * 74, [0.5] * 5)


def test_plain_prompts_are_literal():
    text = r"(a:1e400) BREAK \[b"
    assert cut(BYTES, text, plain=True) == [(BYTES.encode(text), [1.0] * len(BYTES.encode(text)))]
    assert len(cut(BYTES, "(" + "a " * 80, plain=True)) == 2


@pytest.mark.parametrize("prompt", ["a " * 75 * MAX_CHUNKS + "a", "a BREAK " * MAX_CHUNKS + "a"])
def test_absurdly_many_chunks_are_refused(prompt):
    assert len(cut(BYTES, prompt[:-1])) == MAX_CHUNKS
    refused("more than 32 chunks of 75 tokens", cut, BYTES, prompt)


# Encoding


@pytest.mark.parametrize("layout", ["transformers", "openclip"])
@pytest.mark.parametrize("pooled", [False, True])
def test_without_syntax_it_is_the_encoders_own_to_the_bit(layout, pooled):
    model = encoder(layout, pooled=pooled)
    for prompts in (["a cat"], ["a cat", "", "a cat", "the red brick wall: 1", "a,b; c"], ["house " * 14], []):
        have, want = encode_prompts(model, prompts), model(prompts)
        assert have.keys() == want.keys() and all(torch.equal(have[key], want[key]) for key in want)
        assert count_chunks(model, prompts) == [1] * len(prompts)
    literal = model(["a (cat:2)"])["c_crossattn"]
    assert torch.equal(encode_prompts(model, [r"a \(cat:2\)"])["c_crossattn"], literal)
    assert torch.equal(encode_prompts(model, ["a (cat:2)"], plain=True)["c_crossattn"], literal)
    beside = encode_prompts(model, ["a cat", "(dog:1.5)"])["c_crossattn"]  # a weighted neighbour does not touch it
    assert torch.equal(beside[0], model(["a cat", "dog"])["c_crossattn"][0])


def test_weights_multiply_and_the_mean_is_restored():
    """By hand, with a spied encoder: state [t + 1, 1] for a, [3, 5] for b, [1, 1] for all others."""
    table = torch.ones(514, 2)
    table[A], table[B] = torch.tensor([2.0, 1.0]), torch.tensor([3.0, 5.0])
    have = encode_prompts(spied(table), ["(a:0.5) (b:2)"])["c_crossattn"]
    # start, a, b, end, padding, padding: sum 2 + 3 + 8 + 2 + 2 + 2 = 19; weighted 2 + 1.5 + 16 + 2 + 2 + 2 = 25.5
    want = 19 / 25.5 * torch.tensor([[[1, 1], [1, 0.5], [6, 10], [1, 1], [1, 1], [1, 1]]])
    torch.testing.assert_close(have, want, atol=0, rtol=1e-6)


def test_each_chunk_has_a_mean_of_its_own():
    table = torch.ones(514, 1)
    table[A], table[B] = 2.0, 4.0
    have = encode_prompts(spied(table, context_length=4), ["a (a:3) b BREAK (b:0.5)", "a"], chunks=3)["c_crossattn"]
    first = 6 / 10 * torch.tensor([1, 2, 6, 1.0])  # start, a, a, end: 1 + 2 + 2 + 1 = 6; 1 + 2 + 6 + 1 = 10
    third = 7 / 5 * torch.tensor([1, 2, 1, 1.0])  # start, b, end, padding: 7; 5
    want = [[*first, 1, 4, 1, 1, *third], [1, 2, 1, 1] + 8 * [1]]
    torch.testing.assert_close(have[..., 0], torch.tensor(want), atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_applied_in_float32_or_wider(dtype):
    torch.manual_seed(0)
    states = (1 + torch.randn(2, 8, 16)).to(dtype)
    weights = torch.tensor([[1.0] * 8, [1.0, 900.0, 0.5, 0.5, -1.0, 1.0, 1.0, 1.0]])
    have, x = weigh(states, weights), states.double()
    y = x * weights[..., None]
    assert have.dtype == dtype and torch.equal(have[0], states[0])
    want = (y * (x.mean((1, 2)) / y.mean((1, 2)))[:, None, None])[1]
    # half precision: one rounding of the result; below 6e-5, float16's are absolute
    torch.testing.assert_close(have[1].double(), want, atol=1e-7, rtol=max(0.51 * torch.finfo(dtype).eps, 1e-6))


def test_a_meaningless_mean_is_not_restored():
    """Tokens' means of both signs or negative weights; A1111 would multiply by 1 / 203, -1 / 7, 2, 0, infinity, -2."""
    three, turned = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, -1.0]])
    means = [([1.0, -1.01], three), ([5.0, -4.0], three), ([1.25, -0.25], three), ([1.0, -1.0], three)]
    for values, weights in [*means, ([3.0, -1.0], three), ([1.0, 3.0], turned)]:
        states = torch.tensor(values)[None, :, None]
        assert torch.equal(weigh(states, weights), states * weights[..., None])


def test_chunks_follow_one_another_and_short_prompts_are_padded():
    model = encoder(pooled=True)
    prompts = ["cat " * 20, "dog BREAK house BREAK wall", "dog"]
    assert count_chunks(model, prompts) == [2, 3, 1] and count_chunks(model, prompts, plain=True) == [2, 1, 1]
    have = encode_prompts(model, prompts)
    parts = [["cat " * 14, "cat " * 6, ""], ["dog", "house", "wall"], ["dog", "", ""]]
    want = [[model([text]) for text in row] for row in parts]
    assert have["c_crossattn"].shape == (3, 48, 32) and have["c_adm"].shape == (3, 32)
    for i, row in enumerate(want):
        torch.testing.assert_close(have["c_crossattn"][i], torch.cat([c["c_crossattn"][0] for c in row]), **TOLERANCE)
        torch.testing.assert_close(have["c_adm"][i], row[0]["c_adm"][0], **TOLERANCE)  # of the first chunk
    longer = encode_prompts(model, ["dog"], chunks=3)
    torch.testing.assert_close(longer["c_crossattn"][0], have["c_crossattn"][2], **TOLERANCE)
    # and clip-skip reaches all chunks
    skipped, rows = encode_prompts(model, prompts[:1], clip_skip=2), model(parts[0][:2], clip_skip=2)
    torch.testing.assert_close(skipped["c_crossattn"][0], rows["c_crossattn"].flatten(0, 1), **TOLERANCE)


def test_padding_the_empty_prompt_changes_nothing_that_attention_sees():
    """Keys and values twice over have the same softmax average, so the usual negative prompt is the same for any k."""
    model, q = encoder(), torch.randn(1, 1, 5, 32)
    one, three = (encode_prompts(model, [""], chunks=k)["c_crossattn"][:, None] for k in (1, 3))
    torch.testing.assert_close(attention(q, three, three), attention(q, one, one), **TOLERANCE)


@pytest.mark.parametrize("prompts", [["cat " * 20, "(dog:1.4)"], ["a BREAK (b:0.7)", "(a [b: 2) BREAK c", "a"]])
def test_a_prompt_is_alone_what_it_is_in_a_batch(prompts):
    model = encoder(pooled=True)
    batch = encode_prompts(model, prompts * 2, chunks=2)
    for i, prompt in enumerate(prompts * 2):
        for key, value in encode_prompts(model, [prompt], chunks=2).items():
            torch.testing.assert_close(batch[key][i], value[0], **TOLERANCE)


def test_each_prompt_is_encoded_once_and_all_in_one_call():
    model, calls = encoder(), []
    model.tower.blocks()[0].register_forward_hook(lambda module, args, out: calls.append(len(out)))
    encode_prompts(model, ["cat " * 20, "dog", "dog", "cat " * 20, "(house:2)"])
    assert calls == [3 * 2]


# Other conditioners, the model that ships, bad arguments


class Classes(torch.nn.Embedding):
    def forward(self, classes):
        return {"c_crossattn": super().forward(torch.tensor(classes))[:, None]}


def test_other_conditioners_are_called_as_they_are():
    model = Classes(10, 4)
    assert torch.equal(encode_prompts(model, [3, 5], chunks=1)["c_crossattn"], model([3, 5])["c_crossattn"])
    assert count_chunks(model, [3, 5]) == [1, 1]
    for arguments in ({"clip_skip": 2}, {"chunks": 2}):
        refused("need CLIP's text encoder, .* conditioned by Classes", encode_prompts, model, [3], **arguments)
    tokens = encoder().tokenizer(["a (cat)", "dog"])  # nor are ids of tokens read
    assert torch.equal(encode_prompts(encoder(), tokens)["c_crossattn"], encoder()(tokens)["c_crossattn"])
    assert count_chunks(encoder(), tokens) == [1, 1]
    seen = []
    bert = type("BERT", (torch.nn.Module,), {"forward": lambda self, prompts: seen.append(prompts)})()
    encode_prompts(bert, ["a (cat:1e400)"])
    assert seen == [["a (cat:1e400)"]]


@torch.no_grad()
def test_the_model_that_ships():
    """Its context of 24 tokens makes chunks of 22; its features average to almost zero."""
    digits = ldm.load(device="cpu").cond_stage_model
    prompts = ["a handwritten digit five", "seven"]
    have, want = encode_prompts(digits, prompts), digits(prompts)
    assert all(torch.equal(have[key], want[key]) for key in ("c_crossattn", "c_adm"))
    assert count_chunks(digits, ["five " * 22, "five " * 23]) == [1, 2]
    prompt = "a bold handwritten (digit:0.7) 7, leaning right"
    z = digits(["a bold handwritten digit 7, leaning right"])["c_crossattn"]
    weighted = z.clone()
    weighted[:, 4] *= 0.7
    assert abs(z.mean() / weighted.mean()) > 20  # what A1111's rule would multiply everything by
    assert torch.equal(encode_prompts(digits, [prompt])["c_crossattn"], weighted)
    sound = digits([prompts[0]])["c_crossattn"].double()
    y = sound.clone()
    y[:, 4] *= 1.3
    have = encode_prompts(digits, ["a handwritten digit (five:1.3)"])["c_crossattn"]
    # the means are 1e-3 of the features, so float32 knows their ratio to 1e-4
    torch.testing.assert_close(have.double(), y * sound.mean() / y.mean(), atol=1e-5, rtol=1e-4)


def test_bad_arguments_are_named():
    model = encoder()
    for call in (encode_prompts, count_chunks):
        refused("a list of prompts, not one string", call, model, "a cat")
        refused("the weight inf of 'a'", call, model, ["(a:1e400)"])
    for chunks in (0, 1, MAX_CHUNKS + 1):
        with pytest.raises(ValueError, match=f"a prompt of 2 chunks cannot be padded to {chunks}; the maximum is 32"):
            encode_prompts(model, ["a BREAK b"], chunks=chunks)
