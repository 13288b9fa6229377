"""Write a policy of a run as a Hugging Face folder with a model card.

    python -m listopd_jax.export --workdir=runs/demo --policy=opd_lambda2.0_seed0 --out=FOLDER
        [--steps=best] [--adapter]

FOLDER must be new: it appears whole, with weights, config, generation config, tokenizer and README.md. The policies of
a run are those named in its results.json. --adapter writes only what a student with lora.rank learnt, as a folder that
peft loads on top of student.weights: SFT and distillation as one adapter of twice the rank.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from listopd_jax import config as config_module
from listopd_jax.errors import Parser, UserError, exit_code
from listopd_jax.lifecycle import quiet_libraries


def export(
    workdir: pathlib.Path, policy: str, out: pathlib.Path, steps: str = "last", adapter: bool = False
) -> None:
    """Write `policy` of the run in `workdir`, or only its adapter, to the new folder `out`.

    `steps`: last, best (by useful) or a number, of the steps at which it was evaluated. UserError for whatever
    prevents it.
    """
    from listopd_jax.models.hf import save_adapter, save_hf
    from listopd_jax.report.card import model_card
    from listopd_jax.report.inputs import read_inputs
    from listopd_jax.stages.export import find_policy, policy_adapter, policy_model

    inputs = read_inputs(workdir)
    if not (saved := inputs.config.get("config")):
        raise UserError(f"{workdir}: holds no config.json of a run; give the --workdir of one")
    record = find_policy(inputs.results, policy, steps)
    config = config_module.at_point(config_module.from_json(saved), record.sweep)
    source = config, workdir, record
    card = model_card(config, inputs, record)
    if adapter:
        save_adapter(out, *policy_adapter(*source), card=card)
        return
    model = policy_model(*source)
    save_hf(out, model.shape, model.params, model.tokenizer, ends=model.ends, card=card, replace=False)


def main(argv: Sequence[str]) -> None:
    """Export and say where."""
    parser = Parser(
        prog="python -m listopd_jax.export", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of the run")
    parser.add_argument("--policy", required=True, help="its name in results.json")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder to write, which must be new")
    parser.add_argument(
        "--steps",
        default="last",
        help="last, best (by useful), or a number: of those at which it was evaluated",
    )
    parser.add_argument(
        "--adapter", action="store_true", help="only what was learnt, as a LoRA adapter for peft"
    )
    args = parser.parse_args(argv)
    quiet_libraries()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a run may hold the accelerator, and copying needs none
    export(args.workdir, args.policy, args.out, args.steps, args.adapter)
    print(f"{args.policy}: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
