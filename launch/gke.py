"""python -m launch.gke --root=/mnt/grid --stage=common --topology=v5e:16x16 --image=IMAGE --claim=PVC --config=… > F

Print Kubernetes manifests for a grid on TPU slices of GKE: one JobSet per point (or one for the common stages), each a
slice of its own, for `kubectl apply -f F`. --root is the path in the pods, in the volume of the claim, which every pod
must be able to write (Filestore, Lustre: a file system with locks). With --format=xpk: the commands of xpk instead.

First --stage=common; when its JobSet is complete, --stage=points. Points that are done end at once when started again,
and are left out if --root is visible here. A pod's machine that fails or is pre-empted restarts its whole slice, which
resumes from the last checkpoint; a mistake (exit code 2) does not.
"""

import argparse
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from launch import cli
from launch.grid import COMMON, Grid, dns_name, make_grid
from launch.tpu import Slice, parse_topology
from listopd_jax import config as config_module
from listopd_jax.errors import Parser, UserError, exit_code, positive
from listopd_jax.parallel.mesh import mesh_sizes
from listopd_jax.train.preflight import check_mesh

GRACE_SECONDS = 120  # from SIGTERM to SIGKILL: the current step, and the save
Json = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Parse and print."""
    args, arguments = cli.parse_grid(_parser(), argv)
    if args.mount not in (args.root, *args.root.parents) or not args.root.is_absolute():
        raise UserError(
            f"--root={args.root}: must be a folder in the volume, which is mounted at --mount={args.mount}"
        )
    part = parse_topology(args.topology)
    grid = remote_grid(args.root, arguments, part)
    names = stage_names(grid, args.stage)
    if args.format == "xpk":
        print("\n".join(shlex.join(xpk_command(grid, name, part, args)) for name in names))
    else:
        items = [jobset(grid, name, part, args) for name in names]
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=2))
    return 0


def _parser() -> Parser:
    parser = cli.grid_parser("launch.gke", __doc__)
    parser.add_argument("--stage", choices=(COMMON, "points"), required=True)
    parser.add_argument("--topology", required=True, help="slice of one point, e.g. v5e:16x16")
    parser.add_argument(
        "--image", required=True, help="container image whose working directory is this repository"
    )
    parser.add_argument(
        "--claim", required=True, help="PersistentVolumeClaim (xpk: storage) that holds --root"
    )
    parser.add_argument(
        "--mount", type=pathlib.Path, default=pathlib.Path("/mnt"), help="where it is mounted; /mnt"
    )
    parser.add_argument("--name", default="listopd", help="prefix of the names of the JobSets")
    parser.add_argument("--restarts", type=positive, default=20, help="times a point may be restarted")
    parser.add_argument("--spot", action="store_true", help="machines that may be pre-empted")
    parser.add_argument("--queue", help="Kueue's LocalQueue")
    parser.add_argument("--format", choices=("jobset", "xpk"), default="jobset")
    parser.add_argument("--cluster", help="of --format=xpk")
    return parser


def remote_grid(root: pathlib.Path, arguments: Sequence[str], part: Slice) -> Grid:
    """The grid for a `root` that may not be visible here: checked and recorded if it is, else by the pods.

    Raises UserError if the slice of a point cannot hold the config's mesh, or the mesh does not divide a batch. The
    models' dimensions are checked by the pods, which see the weights.
    """
    config = cli.checked_config(arguments)
    check_mesh(config, {}, mesh_sizes(config.parallel, part.chips))
    if root.is_dir():
        return cli.open_grid(root, arguments, config)
    return make_grid(root, arguments, config_module.to_json(config))


def stage_names(grid: Grid, stage: str) -> list[str]:
    """The names to start for a stage; UserError if all of it is done."""
    names = [name for name in ([COMMON] if stage == COMMON else grid.names) if not grid.done(name)]
    if not names:
        raise UserError(f"--stage={stage}: nothing is left to do")
    return names


def jobset(grid: Grid, name: str, part: Slice, args: argparse.Namespace) -> Json:
    """The JobSet (jobset.x-k8s.io/v1alpha2) of a point: one slice, an indexed Job with a pod on each of its hosts."""
    rules = [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    labels = {"kueue.x-k8s.io/queue-name": args.queue} if args.queue else {}
    # one slice, one Job: hosts of different node pools share no interconnect
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": dns_name(args.name, name), "labels": labels, "annotations": exclusive},
        "spec": {
            "failurePolicy": {"maxRestarts": args.restarts, "rules": rules},
            "replicatedJobs": [
                {"name": "slice", "replicas": 1, "template": {"spec": _job(grid, name, part, args)}}
            ],
        },
    }


def _job(grid: Grid, name: str, part: Slice, args: argparse.Namespace) -> Json:
    """The Job: all hosts or none, and no restart after exit code 2."""
    mistake = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "point", "operator": "In", "values": [2]},
    }
    return {
        "parallelism": part.hosts,
        "completions": part.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one lost host stops all of them; the JobSet restarts them together
        "podFailurePolicy": {"rules": [mistake]},
        "template": {"spec": _pod(grid, name, part, args)},
    }


def _pod(grid: Grid, name: str, part: Slice, args: argparse.Namespace) -> Json:
    """The pod of one host. GKE tells jax.distributed which host it is and who the others are."""
    chips = {"google.com/tpu": str(part.chips_per_host)}
    selector = {
        "cloud.google.com/gke-tpu-accelerator": part.generation.gke,
        "cloud.google.com/gke-tpu-topology": part.shape,
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": selector | ({"cloud.google.com/gke-spot": "true"} if args.spot else {}),
        "containers": [
            {
                "name": "point",
                "image": args.image,
                "command": grid.point_command(name),
                "env": [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}],  # no TPU is an error, not a slow run
                "resources": {"requests": chips, "limits": chips},
                "volumeMounts": [{"name": "grid", "mountPath": str(args.mount)}],
            }
        ],
        "volumes": [{"name": "grid", "persistentVolumeClaim": {"claimName": args.claim}}],
    }


def xpk_command(grid: Grid, name: str, part: Slice, args: argparse.Namespace) -> list[str]:
    """The xpk command that starts a point on a cluster made by xpk, with a storage attached by `xpk storage`."""
    if not args.cluster:
        raise UserError("--cluster is missing: --format=xpk needs the name of the cluster")
    command = [
        "xpk", "workload", "create",
        f"--cluster={args.cluster}",
        f"--workload={dns_name(args.name, name)}",
        f"--tpu-type={part.generation.prefix}-{part.shape}",
        "--num-slices=1",
        f"--docker-image={args.image}",
        f"--storage={args.claim}",
        f"--max-restarts={args.restarts}",
        f"--termination-grace-period-seconds={GRACE_SECONDS}",
        f"--command={shlex.join(grid.point_command(name))}",
    ]  # fmt: skip
    return command


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
