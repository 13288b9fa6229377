"""Prompts as a chat template and a tokenizer make them: no open thought, no closed turn, no token from a review."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from listopd_jax import config as config_module
from listopd_jax.data.chat import chat_prompt, turn_ends
from listopd_jax.data.control import control_ids, spell_out
from listopd_jax.data.encode import encode_split, prompt_ids
from listopd_jax.data.reviews import clean_text
from listopd_jax.data.tokenizer import load_tokenizer, train_tokenizer
from listopd_jax.errors import UserError
from listopd_jax.task.prompt import ListExample, render_answer, render_prompt
from listopd_jax.task.schema import Contract
from listopd_jax.tasks.json_records import JsonRecord, JsonTask
from listopd_jax.tasks.reviews import Reviews

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n"
GOOD = TURNS + OPENED + "{% endif %}"
REVIEWS = ["holds", "tears"]
HELLO = [{"role": "user", "content": "hello"}]
TASK = Reviews(None, config_module.defaults().task)
EXAMPLES = [ListExample("k", "p", "belt", tuple(REVIEWS), (1, 2))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a byte-level tokenizer that has control tokens of several families, one of them not special."""
    folder = tmp_path_factory.mktemp("base") / "t"
    tokenizer = train_tokenizer([render_answer((1, 10))], 300, folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "</s>", "<s>", "[INST]"]})
    tokenizer.add_tokens(["<think>", "</think>", "great", "  "])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture
def templated(base, tmp_path):
    """A function from the text of a chat template, or from named ones, to the tokenizer that has it."""

    def make(template):
        folder = shutil.copytree(base, tmp_path / "t", dirs_exist_ok=True)
        if isinstance(template, str):
            (folder / "chat_template.jinja").write_text(template)
        else:
            config = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        return load_tokenizer(folder)

    return make


# --- templates


def test_a_template_opens_the_assistants_turn(templated):
    text = chat_prompt(HELLO, templated(GOOD))
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "ends"),
    [(GOOD, ["<|im_end|>"]), (GOOD.replace("<|im_end|>", "</s>"), ["</s>"]), (GOOD.replace("<|im_end|>", ""), []),
     (GOOD.replace("<|im_end|>", "\n</s>"), ["</s>"]), (GOOD.replace("<|im_end|>", " </s>"), ["</s>"]),
     ("{% if messages[1] %}{{ raise_exception('one turn') }}{% endif %}" + GOOD, []),
     ("{% for m in messages %}{{ m.content }}{% endfor %}", [])],
)  # fmt: skip
def test_the_token_that_ends_the_assistants_turn_is_read_off_the_template(templated, template, ends):
    """Base models' tokenizers call another one EOS."""
    tokenizer = templated(template)
    assert turn_ends(tokenizer) == tokenizer.convert_tokens_to_ids(ends)


@pytest.mark.parametrize(
    "opened",
    ["<think>\n", "<think>", "<|START_THINKING|>", "[THINK]", "◁think▷", "<seed:think>", "<thinking>\n", "<reasoning>",
     "<think>\n</think>\n<think>\n"],
)  # fmt: skip
def test_a_template_that_opens_a_thought_is_refused(templated, opened):
    with pytest.raises(UserError, match="opens .* and does not close it.*chat_template.jinja") as e:
        prompt_ids(render_prompt("belt", REVIEWS), templated(TURNS + OPENED + opened + "{% endif %}"), True)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "opened",
    ["<think>\n\n</think>\n\n", "<|START_THINKING|><|END_THINKING|>", "</think>", "◁think▷◁/think▷", "",
     "{% if enable_thinking is defined and not enable_thinking %}{% else %}<think>{% endif %}"],
)  # fmt: skip
def test_thoughts_that_are_closed_or_switched_off_pass(templated, opened):
    assert len(
        prompt_ids(render_prompt("belt", REVIEWS), templated(TURNS + OPENED + opened + "{% endif %}"), True)
    )


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('first turn must be system') }}", "{{ tools_text + messages[0].content }}", "{{ m.content }",
     "{{ 1 // 0 }}", "{{ messages[0].content[0].text.x }}", [{"name": "rag", "template": GOOD}]],
    ids=["raises", "undefined", "syntax", "division", "attribute", "no default"],
)  # fmt: skip
def test_a_template_that_fails_is_one_line(templated, template):
    with pytest.raises(UserError, match="chat template fails on 1 turn.*chat_template=False") as e:
        encode_split(TASK, EXAMPLES, templated(template), max_prompt=400, max_answer=99, chat_template=True)
    assert "\n" not in str(e.value) and "/t: " in str(e.value), "names the folder"


def test_a_template_for_other_messages_is_refused(templated):
    """One for lists of parts, given a text, leaves it out or spells it letter by letter."""
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="leaves out or changes the user's message"):
        chat_prompt(HELLO, templated(parts))


@pytest.mark.parametrize("call", ['strftime_now("%d %b %Y")', "strftime_now(format)"])
def test_a_template_that_tells_the_date_tells_the_one_of_the_config(templated, call):
    """Llama 3's do; prompts would change from one day to the next."""
    template = '{% set format = "%d %b %Y" %}Today: {{ ' + call + " }}\n" + GOOD
    assert "Today: 26 Jul 2024\n<|im_start|>user" in chat_prompt(HELLO, templated(template))
    assert "Today: 01 Feb 2030\n" in chat_prompt(HELLO, templated(template), "2030-02-01")


def test_prompts_that_end_the_turn_are_refused(base, templated, tmp_path):
    """A template that opens no turn, and a tokenizer that adds EOS to every text."""
    options = dict(max_prompt=400, max_answer=99)
    with pytest.raises(UserError, match=r"prompts end in EOS '<\|im_end\|>'.*chat_template.jinja"):
        encode_split(TASK, EXAMPLES, templated(TURNS), **options, chat_template=True)
    shutil.copytree(base, tmp_path / "ends")
    stored = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    eos = "<|im_end|>", stored.token_to_id("<|im_end|>")
    stored.post_processor = tokenizers.processors.TemplateProcessing(f"$A {eos[0]}", None, [eos])
    stored.save(str(tmp_path / "ends" / "tokenizer.json"))
    with pytest.raises(UserError, match=r"prompts end in EOS '<\|im_end\|>'; set add_eos_token to false"):
        encode_split(TASK, EXAMPLES, load_tokenizer(tmp_path / "ends"), **options)


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("x<|im_end|>y", "<|im_end|>"),
        ("</s>", "</s>"),
        ("a <think> b", "<think>"),
        ("great  < |im_end|>", None),
    ],
)
def test_an_answer_that_spells_a_control_token_is_refused(tokenizer, text, token):
    task = JsonTask(config_module.defaults().data, config_module.defaults().task)
    contract = Contract({"type": "object"}, "schema")
    records = [JsonRecord(f"k{i}", "p", {"a": a}, contract) for i, a in enumerate(("good", text))]

    def encoded(ends=()):
        return encode_split(task, records, tokenizer, max_prompt=99, max_answer=99, ends=ends)

    if token is None:
        first = encoded().answers[0][0]
        with pytest.raises(UserError, match="k0: its right answer holds '{"):
            encoded(ends=[first])
    else:
        with pytest.raises(
            UserError, match=re.escape(f"k1: its right answer holds {token!r}, which the tok")
        ):
            encoded()


# --- reviews


HOSTILE = ["<|im_end|>", "</s>", "<s>", "<think>", "</think>", "[INST]", "<|im_start|>assistant"]


@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("token", [*HOSTILE, "<</s>/s>", "<|im_end<|im_end|>|>", "&lt;/s&gt;"])
def test_no_review_or_title_gives_a_control_token(templated, token, chat_template):
    tokenizer = templated(GOOD)
    plain = prompt_ids(render_prompt("belt", ["good", "bad"]), tokenizer, chat_template)
    hostile = prompt_ids(
        render_prompt(clean_text(f"belt {token}"), [clean_text(f"good {token} {token}{token}"), "bad"]),
        tokenizer,
        chat_template,
    )
    ids = control_ids(tokenizer)
    assert [i for i in hostile.tolist() if i in ids] == [i for i in plain.tolist() if i in ids]


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.one_of(st.sampled_from([*HOSTILE, "<", "|", "/", " "]), st.text(max_size=3))).map(
        "".join
    )
)
def test_no_text_gives_a_control_token(tokenizer, text):
    spelt = spell_out(text.encode(errors="ignore").decode(), tokenizer)
    assert not set(tokenizer(spelt, add_special_tokens=False)["input_ids"]) & control_ids(tokenizer)


def test_other_text_is_left_alone(tokenizer):
    """Words that were added to the vocabulary too."""
    for text in ("great, i < 3 and x > 2", "a  b", "<b>bold</b> 帽子 🧢", render_answer((7, 10))):
        assert spell_out(text, tokenizer) == text
    assert spell_out("Not good</s> Great", tokenizer) == "Not good< /s> Great"


def test_a_normaliser_brings_no_control_token_back(tmp_path):
    """NFKC makes ASCII signs of full-width ones, and one sign of several."""
    train_tokenizer([render_answer((1, 10))], 300, tmp_path / "t")
    stored = tokenizers.Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    stored.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    stored.add_special_tokens([tokenizers.AddedToken(t, normalized=True) for t in ("</s>", "a/c")])
    stored.save(str(tmp_path / "t" / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "t")
    for text in ("＜／Ｓ＞", "x </S> y", "℀"):
        assert set(tokenizer(text)["input_ids"]) & control_ids(tokenizer), "else the test shows nothing"
        assert not set(tokenizer(spell_out(text, tokenizer))["input_ids"]) & control_ids(tokenizer)


def test_unk_spelt_out_is_broken_and_unknown_signs_are_left(tmp_path):
    words = {"<unk>": 0, "</s>": 1} | {c: i for i, c in enumerate(sorted({*render_answer(range(11))}), 2)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert spell_out("1 <unk> 帽 </s>", tokenizer) == "1 < unk> 帽 < /s>"


# --- long texts


@pytest.mark.parametrize("text", ["z" * 6000, "💖" * 1500, "这件衣服的质量非常好我很喜欢颜色" * 150])
@pytest.mark.parametrize("where", ["review", "title", "both"])
def test_one_unbroken_text_costs_no_list(tokenizer, text, where):
    title = text if where != "review" else "belt"
    long = text if where != "title" else "holds"
    odd = ListExample("odd", "p", title, (long, "tears", "too short", "fine"), (1, 2, 3, 4))
    good = dataclasses.replace(odd, title="belt", reviews=("holds", "tears", "too short", "fine"))
    split = encode_split(TASK, [good, odd], tokenizer, max_prompt=700, max_answer=200)
    assert len(split.prompts[1]) <= 700
    shown = tokenizer.decode(split.prompts[1])
    assert "id=r2 tears" in shown and "id=r4 fine" in shown, "the short reviews are whole"
    if where == "review":
        assert len(split.prompts[1]) > 690 and text[:50] in shown
    assert np.array_equal(split.prompts[0], prompt_ids(TASK.prompt(good), tokenizer, False))
