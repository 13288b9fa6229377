"""What a user may write after --config, and the one line that answers a mistake there."""

import contextlib
import keyword
import pathlib
import re
from collections.abc import Iterator, Sequence

from absl import flags

from listopd_jax.config.fields import REMOVED, RENAMED, defaults, flatten
from listopd_jax.errors import UserError, did_you_mean, one_line


def auto_preset() -> str:
    """`tiny` on a CPU, `paper` on a GPU or TPU."""
    import jax

    return "tiny" if jax.default_backend() == "cpu" else "paper"


def find_config_file(argv: Sequence[str]) -> list[str]:
    """`argv`; a config file that the working directory lacks is taken from the package's parent folder.

    That is the checkout's own folder, or where `pip install .` put configs/. UserError if it is in neither place.
    """
    root = pathlib.Path(__file__).resolve().parents[2]
    found = list(argv)
    for i, arg in enumerate(found):
        flag, _, value = arg.partition("=")
        path, colon, preset = value.partition(":")
        if flag != "--config" or not path or pathlib.Path(path).exists():
            continue
        if not (root / path).exists():
            raise UserError(
                f"--config={path}: no such file, here or next to the package; run in a checkout of listopd_jax"
            )
        found[i] = f"--config={root / path}{colon}{preset}"
    return found


def unknown_field(argv: Sequence[str], e: Exception) -> str:
    """One line for an unknown field, with its new name or a close one; ml_collections names only its last part."""
    message = str(e)
    names = [a.split("=")[0] for a in argv if a.startswith("--config.")]
    wrong = (re.search(r'(?:Key "|\b)(\w+)', message) or [""])[1]
    where = next((n for n in names if n.rsplit(".", 1)[-1] == wrong), "--config")
    answers = {old: f"{old} is {new} now" for old, new in RENAMED.items()}
    answers |= {old: f"{old} is gone, leave it out: {why}" for old, why in REMOVED.items()}
    for old, answer in answers.items():
        if where == f"--config.{old}" or (where == "--config" and old.endswith(f".{wrong}")):
            return f"{where}: {answer}"
    near = re.search(r'Did you mean \\?"([^"\\]+)', message)
    hint = f"did you mean {near[1]}? " if near else ""
    return f"{where}: there is no such field; {hint}listopd_jax/config/fields.py has them all"


@contextlib.contextmanager
def flag_mistakes(argv: Sequence[str]) -> Iterator[None]:
    """While inside, errors of absl and ml_collections for a wrong flag, field, type or file become UserErrors."""
    if problem := keyword_field(argv) or decimal_comma(argv):
        raise UserError(problem)
    try:
        yield
    except (AttributeError, KeyError) as e:
        raise UserError(unknown_field(argv, e)) from e
    except (flags.Error, TypeError, ValueError, ImportError, OSError, SyntaxError) as e:
        raise UserError(one_line(e)) from e


def keyword_field(argv: Sequence[str]) -> str | None:
    """One line for an override of a field that no config can have, a Python keyword; None if there is none.

    `--config.opd.lambda=1.2` and `--config.opd.lambda.x=1` are not valid Python, so ml_collections cannot read them.
    """
    for name in (a.split("=")[0] for a in argv if a.startswith("--config.")):
        parts = name.removeprefix("--config.").split(".")
        at = next((i for i, part in enumerate(parts) if keyword.iskeyword(part)), None)
        if at is not None:
            known = [field for field, _ in flatten(defaults().to_dict())]
            near = did_you_mean(".".join(parts[: at + 1]), known).replace("'", "")
            return f"{name}: no such field; {near}listopd_jax/config/fields.py has them all"
    return None


def decimal_comma(argv: Sequence[str]) -> str | None:
    """One line for a λ that is written as 1,5 and may mean 1.5, or 1 and 5; None if there is none."""
    fields = r"(?:opd|forecast)\.(?:plain_)?lambdas|predict\.anchors"
    for arg in argv:
        if found := re.fullmatch(rf"(--config\.(?:{fields}))=([0-9]+),([0-9]+)", arg):
            field, one, two = found.groups()
            return f"{arg}: one λ or two? Write {field}={one}.{two}, or {field}={one}.0,{two}.0"
    return None
