"""Token ids, text and token classes, with a small byte-level tokenizer and, where it is at hand, Qwen3's."""

import json

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from listopd_jax.task.codec import Codec
from listopd_jax.task.contract import TOKEN_CLASSES
from listopd_jax.task.prompt import render_answer

ANSWER = render_answer((7, 10, 0))


def small_tokenizer(**special):
    """A byte-level BPE of a few merges, as PreTrainedTokenizerFast."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<end>", "<other>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([ANSWER, 'review_id "score" hello world'] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


@pytest.fixture(scope="module")
def small():
    return Codec(small_tokenizer(pad_token="<pad>", eos_token="<end>", additional_special_tokens=["<other>"]))


@pytest.fixture(scope="module")
def qwen3(shared):
    return Codec(AutoTokenizer.from_pretrained(shared / "tokenizer" / "qwen3"))


@pytest.fixture(params=["small", "qwen3"])
def codec(request):
    return request.getfixturevalue(request.param)


def encode(codec, text):
    return codec.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "text",
    [ANSWER, "", " leading and trailing ", "a , b . c ' s n't", "Größe 日本語 🙂\n\t[]", '{"x": "\\u00e9"}'],
)
def test_text_round_trips_exactly(codec, text):
    """Nothing is cleaned up: the parser judges what the model wrote, blanks before punctuation included."""
    ids = encode(codec, text)
    assert codec.text(ids) == text
    assert codec.text([*ids, codec.eos]) == text


def test_sizes_and_ids(codec):
    everything = codec.tokenizer.get_vocab().values()
    assert codec.vocab == max(everything) + 1
    assert 0 <= codec.eos < codec.vocab and 0 <= codec.pad < codec.vocab


def test_only_the_last_eos_is_the_end(codec):
    ids = encode(codec, "[1]")
    end = codec.tokenizer.eos_token
    assert codec.text([codec.eos]) == ""
    assert codec.text([*ids, codec.eos, codec.eos]) == f"[1]{end}"
    assert codec.text([codec.eos, *ids]) == f"{end}[1]"


def test_each_of_several_ends_closes_an_answer(small):
    """A model may end its turn with another token than the one that its tokenizer calls EOS."""
    other = small.tokenizer.convert_tokens_to_ids("<other>")
    codec = Codec(small.tokenizer, [other])
    assert codec.ends == tuple(sorted({codec.eos, other})) and codec.eos == small.eos
    ids = encode(codec, ANSWER)
    for end in codec.ends:
        assert codec.text([*ids, end]) == ANSWER
        classes = codec.classes(np.array([[*ids, end]]), np.array([len(ids) + 1]))
        assert TOKEN_CLASSES[classes[0, -1]] == "eos"


def test_ids_may_have_holes(small):
    """A model's rows go to the largest id; an id that no token has is no end of an answer."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[": 0, "<end>": 3, "]": 9}, unk_token="["))
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>"))
    assert codec.vocab == 10 and codec.ends == (3,)
    classes = codec.classes(np.array([[0, 5, 9, 3]]), np.array([4]))[0]
    assert [TOKEN_CLASSES[c] for c in classes] == ["bracket", "other", "bracket", "eos"]


def test_other_special_tokens_stay_visible(codec):
    """A model that writes them breaks its answer, and the parser must see it."""
    ids = encode(codec, "[1")
    assert codec.text([*ids, codec.pad, *encode(codec, "]")]) == f"[1{codec.tokenizer.pad_token}]"


def padded(codec, texts, ends):
    rows = [encode(codec, text) + [codec.eos] * end for text, end in zip(texts, ends, strict=True)]
    lengths = np.array([len(row) for row in rows])
    tokens = np.full((len(rows), lengths.max() + 2), codec.pad)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, lengths


TEXTS = [ANSWER, ANSWER[:-5], "", "no list"]


@pytest.fixture
def rows(codec):
    """A whole answer with EOS, one cut by its budget, an empty one, one with nothing of the contract."""
    return padded(codec, TEXTS, [1, 0, 0, 1])


def test_texts_of_a_batch_end_at_their_lengths(codec, rows):
    tokens, lengths = rows
    assert codec.texts(tokens, lengths) == TEXTS
    assert codec.texts(tokens.reshape(2, 2, -1), lengths.reshape(2, 2)) == TEXTS


def test_an_answer_ends_or_is_cut_off_by_its_budget(codec, rows):
    assert codec.ended(*rows).tolist() == [True, False, False, True]
    assert codec.ended(rows[0].reshape(2, 2, -1), rows[1].reshape(2, 2)).tolist() == [
        [True, False],
        [False, True],
    ]


def test_classes_follow_the_contract(codec, rows):
    tokens, lengths = rows
    classes = codec.classes(tokens, lengths)
    assert ((classes == -1) == (np.arange(tokens.shape[1]) >= lengths[:, None])).all()
    names = [TOKEN_CLASSES[c] for c in classes[0, : lengths[0]]]
    assert names[-1] == "eos" and names.count("eos") == 1 and names[0] in ("bracket", "brace")
    assert {"field", "id", "digit"} <= set(names) and "other" not in names
    assert names.count("digit") >= 3
    assert "eos" not in [TOKEN_CLASSES[c] for c in classes[1, : lengths[1]]]
    assert {TOKEN_CLASSES[c] for c in classes[3, : lengths[3]]} == {"other", "eos"}


def test_structural_tokens_carry_no_scores(codec, rows):
    """Structural tokens spell the skeleton, the others the scores; nothing is structural after the end."""
    tokens, lengths = rows
    structural = codec.structural(tokens, lengths)
    assert structural.dtype == bool
    assert not structural[np.arange(tokens.shape[1]) >= lengths[:, None]].any()
    content = tokens[0, : lengths[0]][~structural[0, : lengths[0]]]
    assert codec.text(content) == "".join(str(item["score"]) for item in json.loads(ANSWER))
    assert structural[0, lengths[0] - 1]  # EOS
    assert not structural[3, : lengths[3] - 1].any()


def test_only_eos_has_no_text(codec):
    """token_classes takes an empty piece for the end, so no other token may have one."""
    pieces = codec._pieces
    assert [i for i, piece in enumerate(pieces) if piece == ""] == [codec.eos]
    assert "".join(pieces[i] for i in encode(codec, ANSWER)) == ANSWER
