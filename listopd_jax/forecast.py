"""Where is the cliff of two checkpoints? Calibration and forecast, without training and without a training config.

    python -m listopd_jax.forecast --teacher=FOLDER --base=FOLDER --prompts=FILE.jsonl [--contract=SCHEMA.json]
        [--lambdas=1,1.25,1.5,2,3] [--out=FOLDER]

Teacher and base are Hugging Face folders, GGUF files or hub ids with one tokenizer; the base is what a student would be
distilled from. Lines are {"prompt": text} or {"messages": [...]}, with a right "answer" and a "schema" of their own if
you have them. Without a contract, parse is the share of answers that are strict JSON. FOLDER of --out becomes a workdir
(calibration.json, results.json, recommendation.json): the same command continues there, further λ are added, and
`python -m listopd_jax.report FOLDER` draws it. Exit code 0: done; 2: a mistake to fix.
"""

import argparse
import contextlib
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from listopd_jax import config as config_module
from listopd_jax import main as main_module
from listopd_jax.data.json_lines import read_objects
from listopd_jax.errors import Parser, UserError, exit_code, positive
from listopd_jax.lifecycle import end, locked, quiet_libraries
from listopd_jax.parallel import compiler
from listopd_jax.records import CALIBRATION, RESULTS, Calibration, Result, read_calibration, read_results

FLAGS = {
    "teacher.weights": "--teacher",
    "student.weights": "--base",
    "tokenizer.path": "--teacher",
    "data.path": "--prompts",
    "task.schema": "--contract",
    "task.chat_template": "--chat-template",
    "task.max_response": "--max-tokens",
    "task.max_prompt": "--max-prompt",
    "forecast.lambdas": "--lambdas",
    "forecast.batch_size": "--batch-size",
    "evaluation.batch_size": "--batch-size",
    "dtype.compute": "--dtype",
    "dtype.frozen": "--dtype",
    "opd.clip": "--clip",
    "--workdir": "--out",
}
"""Field of a config → the flag of this command that sets it, in messages too."""
TAKES_LESS = "a smaller --batch-size, fewer --lambdas or --dtype=bfloat16"


def main(argv: Sequence[str]) -> None:
    """Forecast the pair and print what was found."""
    args = _parser().parse_args(argv)
    quiet_libraries()
    compiler.reserve_gpu_memory()
    with _flags_in_messages(), _workdir(args.out) as workdir, compiler.naming_full_memory(TAKES_LESS):
        print(_forecast(pair_config(args), workdir, argv))


def _forecast(config: Any, workdir: pathlib.Path, argv: Sequence[str]) -> str:
    """Do it, and what to print."""
    from listopd_jax.stages.pair import forecast_pair

    main_module.record_config(config, workdir, ["", *argv], "listopd_jax.forecast")
    main_module.set_up(config, workdir)
    recommended = forecast_pair(config, workdir)
    records = [r for r in read_results(workdir / RESULTS) if r.stage == "forecast"]
    lines = [*table(records, read_calibration(workdir / CALIBRATION)), *recommended.lines]
    return "\n".join(lines)


def pair_config(args: argparse.Namespace) -> Any:
    """The checked config in which `args` are spelt out."""
    config = config_module.defaults()
    config.preset = "forecast"
    config.teacher.weights, config.student.weights = args.teacher, args.base
    config.tokenizer.path = args.teacher
    config.data.path = args.prompts
    config.task.update(
        name="json", schema=args.contract, chat_template=_chat(args), max_prompt=args.max_prompt,
        max_response=args.max_tokens,
    )  # fmt: skip
    config.dtype.update(compute=args.dtype, frozen=args.dtype)
    config.forecast.update(lambdas=tuple(sorted({1.0, *args.lambdas})), batch_size=args.batch_size)
    config.evaluation.batch_size = args.batch_size
    config.opd.update(lambdas=(), clip=args.clip)
    return config_module.validate(config)


def _chat(args: argparse.Namespace) -> bool:
    """Whether prompts go through the chat template: as --chat-template says, else where the first line has messages."""
    if args.chat_template:
        return args.chat_template == "True"
    there = pathlib.Path(args.prompts).is_file()  # if not, the task says so
    return there and "messages" in next(read_objects(args.prompts))[1]


def table(records: Sequence[Result], calibration: Calibration) -> Iterator[str]:
    """The lines that say what was found: a row for each λ, then the thresholds."""
    along = {row.lam: row for row in calibration.forecasts}
    answered = any(record.useful is not None for record in records)
    head = ("λ", "parse", "ended", "as the teacher", *(["useful"] if answered else []), "structure flips")
    yield "".join(f"{name:>16}" if i else f"{name:<6}" for i, name in enumerate(head))
    for record in sorted(records, key=lambda record: record.lam):
        own = along.get(record.lam)
        useful = [record.useful] if answered else []
        values = (record.parse, record.ended, own and own.agreement, *useful, own and own.flipped)
        yield f"{record.lam:<6g}" + "".join(f"{_number(value):>16}" for value in values)
    yield from thresholds(calibration)
    yield from (f"note: {note}" for note in calibration.notes)


def thresholds(found: Calibration) -> Iterator[str]:
    """λ_flip along the teacher's answers, and Eq. 4's λ*."""
    for row in found.flips:
        quantiles = (("first", row.min), ("5 %", row.percentile_5), ("half", row.percentile_50))
        flips = ", ".join(f"{name} {'never' if x is None else _number(x)}" for name, x in quantiles)
        yield f"λ_flip of {row.positions} tokens, along {found.prompts} answers of the teacher: {flips}"
    stars = (("typical", "lambda_typ_measured"), ("surest answer", "lambda_safe_measured"))
    values = ", ".join(
        f"{name} {_number(getattr(found, key))}"
        + (f" ({found.reasons[key]})" if key in found.reasons else "")
        for name, key in stars
    )
    yield f"λ* of Eq. 4, clip {'none' if found.clip is None else f'{found.clip:g}'}: {values}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


@contextlib.contextmanager
def _workdir(out: pathlib.Path | None) -> Iterator[pathlib.Path]:
    """The locked folder that the stages work in: `out`, or a temporary one."""
    with contextlib.ExitStack() as stack:
        folder = out or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(locked(folder))
        yield folder


@contextlib.contextmanager
def _flags_in_messages() -> Iterator[None]:
    """While inside, a UserError names this command's flags where it would name fields of a config."""
    try:
        yield
    except UserError as e:
        fields = "|".join(map(re.escape, FLAGS))
        said = re.sub(rf"(?:--config\.)?({fields})\b", lambda found: FLAGS[found[1]], str(e))
        raise UserError(said) from e


def _lambdas(text: str) -> list[float]:
    return [float(x) for x in text.split(",")]


def _parser() -> Parser:
    parser = Parser(
        prog="python -m listopd_jax.forecast", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--teacher", required=True, help="folder of a Hugging Face checkpoint, GGUF file, or hub id")
    add("--base", required=True, help="the same: the model that λ extrapolates away from")
    add("--prompts", required=True, help='JSON lines: {"prompt": …} or {"messages": …}; may be gzip or zip')
    add("--contract", default="", help="a JSON Schema that answers must hold; default: any JSON")
    add("--lambdas", type=_lambdas, default=[1, 1.25, 1.5, 2, 3], help="λ1,λ2,…; λ = 1 is always among them")
    add("--out", type=pathlib.Path, help="folder to keep calibration, forecasts and recommendation in")
    add("--max-tokens", type=positive, default=512, help="of an answer")
    add("--max-prompt", type=positive, default=2048, help="tokens of a prompt")
    add("--chat-template", choices=("True", "False"), help="default: where the first line has messages")
    add("--batch-size", type=positive, default=8, help="prompts at a time, for all λ")
    add("--dtype", choices=config_module.DTYPES, default="float32", help="of weights and of computing")
    add("--clip", type=float, default=5.0, help="c of Eq. 4; inf for none")
    return parser


if __name__ == "__main__":
    end(exit_code(main, sys.argv[1:]))
