"""What a command says of a mistake, whoever raised it."""

import pytest

from listopd_jax.errors import UserError, exit_code


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
