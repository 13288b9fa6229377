"""Thresholds of λ for one position, in plain words or as JSON.

    python -m listopd_jax.theory --p=0.9993 --b=0.8105 --c=5 [--lam=1.2] [--json] [--plot=FILE.png]

--json prints one object: lambda_clip, lambda_clip_base_neutral, lambda_flip, fixed_point, q_c. A value is
null where it is undefined, and "reason" then says why; lambda_flip is null without a reason where no λ flips
the token. The fixed point is taken at --lam, default 1.2. Exit code 2 and one line on standard error for
values outside their range.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from listopd_jax.errors import Parser, UserError, exit_code
from listopd_jax.theory.explain import explain, sentences
from listopd_jax.theory.plots import save_tail_plot


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m listopd_jax.theory", description="Thresholds of the extrapolation weight λ."
    )
    parser.add_argument(
        "--p", type=float, required=True, help="teacher's probability of its modal token, in (0, 1)"
    )
    parser.add_argument(
        "--b", type=float, required=True, help="base's probability of the same token, in (0, 1)"
    )
    parser.add_argument(
        "--c", type=float, default=5.0, help="clip of the importance ratio; inf for none (default 5)"
    )
    parser.add_argument(
        "--lam", type=float, default=1.2, help="λ at which the fixed point is taken (default 1.2)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the target's tail mass against λ")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> str:
    """The command's output. UserError for a user's mistake."""
    args = _arguments(argv)
    try:
        explanation = explain(args.p, args.b, args.c, args.lam)
    except ValueError as e:
        raise UserError(str(e)) from e
    if args.plot:
        try:
            save_tail_plot(explanation, args.plot)
        except OSError as e:
            raise UserError(f"--plot={args.plot}: cannot be written ({e.strerror or e})") from e
    if args.json:
        return json.dumps(explanation.to_json(), allow_nan=False, ensure_ascii=False)
    return "\n".join(sentences(explanation))


def main(argv: Sequence[str]) -> None:
    """Print the thresholds."""
    print(run(argv))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
