"""What a command says of a mistake, whoever raised it."""

import contextlib
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from listopd_jax import files
from listopd_jax.errors import MOST_TEXT, UserError, exit_code
from listopd_jax.models.hf import stored


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("field=3: is wrong"), "error: field=3: is wrong\n"),
        (
            PermissionError(13, "Permission denied", "a/b"),
            "error: a/b: permission denied; correct its permissions\n",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(error, line, capsys):
    def main(argv):
        raise error

    assert exit_code(main, []) == 2
    assert capsys.readouterr().err == line


@given(
    st.text(max_size=50) | st.text("\n\r\x1b\u2028\ud800ab", max_size=20) | st.just("x" * 5000 + "; fix it")
)
def test_whatever_a_message_quotes_it_is_one_line_of_print(text):
    said = str(UserError(text))
    assert said.isprintable() and len(said) <= MOST_TEXT
    assert said == text or not text.isprintable() or len(text) > MOST_TEXT
    assert len(text) < MOST_TEXT or said.endswith("; fix it")


def test_a_file_that_is_there_and_may_not_be_read_is_said_to_be(monkeypatch, tmp_path):
    """Root may read all, so the refusal is made: safetensors calls it a file that is not found."""
    path = tmp_path / "model.safetensors"
    path.write_text("{}")

    def refuse(*_, **__):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(stored, "safe_open", refuse)
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match=f"^{path}: permission denied"):
        stored._open_safetensors(path, stack)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "read_text", denied)
    with pytest.raises(UserError, match=f"^{path}: permission denied; correct its permissions$"):
        files.read_json(path)
