"""python -m launch.tpu_vm --root=/mnt/grid --stage=common --topology=v5e:4x4 --zone=ZONE --setup=setup.sh --config=…

Print the gcloud commands that run a grid on Cloud TPU VMs, one queued resource per point (or one for the common
stages), and write their start-up scripts to --scripts; --run runs the commands. Every host of a slice runs --setup,
your shell script that mounts the folder of --root and changes into a checkout of this repository with a Python that has
it, then its part of the point. When a point ends, well or not, its resource is deleted and costs nothing more.

First --stage=common; when it is done, --stage=points. With --run a resource that waits or works is left alone, and
one that was pre-empted, or failed, is made again and resumes from the last checkpoint.
"""

import argparse
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

from launch import cli
from launch.gke import remote_grid, stage_names
from launch.grid import COMMON, Grid, dns_name
from launch.tpu import Slice, parse_topology
from listopd_jax import files
from listopd_jax.errors import Parser, UserError, exit_code

ENDED = ("SUSPENDED", "SUSPENDING", "FAILED", "DELETING")


def main(argv: Sequence[str]) -> int:
    """Parse, write the scripts, print or run the commands."""
    args, arguments = cli.parse_grid(_parser(), argv)
    part = parse_topology(args.topology)
    try:
        setup = args.setup.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--setup={args.setup}: cannot be read ({e})") from e
    grid = remote_grid(args.root, arguments, part)
    for name in stage_names(grid, args.stage):
        resource = dns_name(args.name, name)
        script = args.scripts / f"{resource}.sh"
        files.write_text(script, startup_script(grid, name, resource, setup, args))
        create = create_command(resource, script, part, args)
        print(shlex.join(create))
        if args.run:
            print(f"{name}: {start(resource, create, args)}", file=sys.stderr)
    return 0


def _parser() -> Parser:
    parser = cli.grid_parser("launch.tpu_vm", __doc__)
    parser.add_argument("--stage", choices=(COMMON, "points"), required=True)
    parser.add_argument("--topology", required=True, help="slice of one point, e.g. v5e:4x4")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", help="default: gcloud's own")
    parser.add_argument(
        "--setup", type=pathlib.Path, required=True, help="shell script that every host runs first"
    )
    parser.add_argument("--scripts", type=pathlib.Path, default=pathlib.Path("runs/tpu_vm"))
    parser.add_argument("--name", default="listopd", help="prefix of the names of the resources")
    parser.add_argument("--spot", action="store_true", help="machines that may be pre-empted")
    parser.add_argument("--run", action="store_true", help="run the commands as well as printing them")
    return parser


def _where(args: argparse.Namespace) -> list[str]:
    return [f"--zone={args.zone}"] + ([f"--project={args.project}"] if args.project else [])


def _gcloud(verb: str, resource: str, args: argparse.Namespace) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, resource, *_where(args)]


def create_command(resource: str, script: pathlib.Path, part: Slice, args: argparse.Namespace) -> list[str]:
    """The command that asks for the slice of a point."""
    return [
        *_gcloud("create", resource, args),
        f"--node-id={resource}",
        f"--accelerator-type={part.accelerator_type}",
        f"--runtime-version={part.generation.runtime}",
        f"--metadata-from-file=startup-script={script}",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",  # to delete itself
        *(["--spot"] if args.spot else []),
    ]


def _delete_command(resource: str, args: argparse.Namespace) -> list[str]:
    return [*_gcloud("delete", resource, args), "--force", "--quiet"]


def startup_script(grid: Grid, name: str, resource: str, setup: str, args: argparse.Namespace) -> str:
    """The script that each host of a slice runs when it starts."""
    delete = shlex.join([*_delete_command(resource, args), "--async"])
    return f"""#!/bin/bash
# The first host deletes the slice when its part has ended, however it ended.
attribute() {{
    curl -s -H Metadata-Flavor:Google "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}}
LISTOPD_HOST=$(attribute agent-worker-number)
trap '[[ $LISTOPD_HOST == 0 ]] && {delete}' EXIT
export LISTOPD_HOST JAX_PLATFORMS=tpu,cpu
hosts=$(attribute worker-network-endpoints)
if [[ $hosts == *,* ]]; then
    first=${{hosts%%,*}} commas=${{hosts//[^,]/}}
    export JAX_NUM_PROCESSES=$((${{#commas}} + 1)) JAX_PROCESS_ID=$LISTOPD_HOST
    export JAX_COORDINATOR_ADDRESS=${{first##*:}}:8476
fi
set -e
{setup.rstrip()}
{shlex.join(grid.point_command(name))}
"""


def start(resource: str, create: Sequence[str], args: argparse.Namespace) -> str:
    """Ask for a slice unless it is there; in words what was done. UserError if gcloud fails."""
    described = _run([*_gcloud("describe", resource, args), "--format=value(state.state)"])
    state = described.stdout.strip()
    if described.returncode == 0 and state not in ENDED:
        return f"left alone, {state}"
    if described.returncode == 0:
        _checked(_delete_command(resource, args))
    _checked(create)
    return "requested again" if state else "requested"


def _checked(command: Sequence[str]) -> None:
    result = _run(command)
    if result.returncode != 0:
        raise UserError(f"{shlex.join(command[:6])}: {cli.last_line(result.stderr)}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as e:
        raise UserError(
            "gcloud is not installed here; leave --run out and run the printed commands elsewhere"
        ) from e


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
