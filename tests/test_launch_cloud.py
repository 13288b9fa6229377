"""launch.gke and launch.tpu_vm: manifests against the published schemas, commands against a gcloud that pretends."""

import json
import math
import pathlib
import re
import shlex
import string
import subprocess
import sys

import jsonschema
import pytest

from configs import fashion
from launch import cli, gke, tpu_vm
from launch.grid import COMMON, dns_name, make_grid
from launch.tpu import GENERATIONS, parse_topology
from listopd_jax import config as config_module
from listopd_jax.errors import UserError

REPO = pathlib.Path(__file__).resolve().parents[1]
ARGUMENTS = ["--config=configs/fashion.py:paper", "--config.opd.lambdas=1.0,1.25"]
REQUIRED = "--config=x --root=/mnt/grid --stage=points --topology=v5e:16x16".split()

# Facts of the JobSet API, jobset.x-k8s.io/v1alpha2: fields and types of what we use, no other fields.
_NAME = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", "maxLength": 63}
_ACTIONS = [
    "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts",
]  # fmt: skip


def _object(properties, required):
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_RULE = _object(
    {
        "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
        "action": {"enum": _ACTIONS},
        "onJobFailureReasons": {"type": "array", "items": {"enum": ["BackoffLimitExceeded", "DeadlineExceeded",
            "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]}},
    },
    ["name", "action"],
)  # fmt: skip
_REPLICATED = _object(
    {"name": _NAME, "replicas": {"type": "integer"}, "template": {"type": "object"}}, ["name", "template"]
)
JOBSET = _object(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object"},
        "spec": _object(
            {
                "failurePolicy": _object(
                    {"maxRestarts": {"type": "integer"}, "rules": {"type": "array", "items": _RULE}}, []
                ),
                "replicatedJobs": {"type": "array", "items": _REPLICATED},
            },
            [],
        ),
    },
    ["apiVersion", "kind", "metadata", "spec"],
)


@pytest.fixture
def grid():
    config = fashion.get_config("paper")
    config.opd.lambdas = (1.0, 1.25)
    config.data.path = "reviews.jsonl"
    checked = config_module.validate(config)
    return make_grid(pathlib.Path("/mnt/grid"), ARGUMENTS, config_module.to_json(checked))


def jobset(grid, name="lambda1.25_seed42", topology="v5e:16x16", *options):
    required = ["--image=registry.example/listopd:1", "--claim=shared", *options]
    return gke.jobset(grid, name, parse_topology(topology), gke._parser().parse_args([*REQUIRED, *required]))


def as_kubernetes_reads_it(kind, value):
    """What is left of `value` after the model `kind` of Kubernetes' own client: what it does not know is lost."""
    kubernetes = pytest.importorskip("kubernetes", reason="needs the Python client of Kubernetes")
    api = kubernetes.client.ApiClient()
    return api.sanitize_for_serialization(api.deserialize(json.dumps(value), kind, "application/json"))


@pytest.mark.parametrize("options", [[], ["--spot", "--queue=tpus", "--restarts=3"]])
@pytest.mark.parametrize("name", [COMMON, "lambda1.0_seed42"])
def test_a_jobset_is_what_the_schemas_say(grid, name, options):
    made = jobset(grid, name, "v5e:16x16", *options)
    jsonschema.validate(made, JOBSET)
    (job,) = made["spec"]["replicatedJobs"]
    assert as_kubernetes_reads_it("V1JobTemplateSpec", job["template"]) == job["template"]
    assert as_kubernetes_reads_it("V1ObjectMeta", made["metadata"]) == made["metadata"]
    # the longest name that JobSet makes of it is that of a pod: JOBSET-slice-0-63-xxxxx
    assert (
        re.fullmatch(r"[a-z][a-z0-9-]*", made["metadata"]["name"])
        and len(made["metadata"]["name"]) <= 63 - 17
    )


def test_the_check_against_kubernetes_finds_a_wrong_field():
    pod = {"containers": [{"name": "x", "imagee": "y"}]}
    assert as_kubernetes_reads_it("V1PodSpec", pod) != pod


@pytest.mark.parametrize(
    ("topology", "hosts", "chips", "accelerator"),
    [
        ("v5e:16x16", 64, 4, "tpu-v5-lite-podslice"),
        ("v5e:1x1", 1, 1, "tpu-v5-lite-podslice"),
        ("v5p:2x2x2", 2, 4, "tpu-v5p-slice"),
        ("v6e:2x2", 1, 4, "tpu-v6e-slice"),
        ("v4:2x2x4", 4, 4, "tpu-v4-podslice"),
    ],
)
def test_the_slice_is_asked_for_whole(grid, topology, hosts, chips, accelerator):
    job = jobset(grid, "lambda1.0_seed42", topology)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts and job["completionMode"] == "Indexed"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": str(chips)}
    assert hosts * chips == math.prod(map(int, topology.split(":")[1].split("x")))
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
    }


def test_one_lost_host_restarts_the_slice_and_a_mistake_does_not(grid):
    made = jobset(grid, "lambda1.0_seed42", "v5e:4x4", "--restarts=7")
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0 and made["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert made["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # without it a podFailurePolicy is refused


def test_every_host_runs_its_point_in_the_volume(grid):
    (container,) = jobset(grid)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["command"] == [
        "python", "-m", "launch.point", "--root=/mnt/grid", "--name=lambda1.25_seed42", *ARGUMENTS,
    ]  # fmt: skip
    assert container["volumeMounts"] == [{"name": "grid", "mountPath": "/mnt"}]


def test_xpk_gets_the_same_point(grid):
    options = ["--image=image:1", "--claim=shared", "--cluster=mine", "--format=xpk"]
    args = gke._parser().parse_args([*REQUIRED, *options])
    command = gke.xpk_command(grid, "lambda1.0_seed42", parse_topology("v5e:16x16"), args)
    assert command[:3] == ["xpk", "workload", "create"]
    assert {"--tpu-type=v5litepod-16x16", "--workload=listopd-lambda1p0-seed42", "--cluster=mine"} <= set(
        command
    )
    assert shlex.split(command[-1].removeprefix("--command="))[2:5] == [
        "launch.point", "--root=/mnt/grid", "--name=lambda1.0_seed42",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("topology", "says"),
    [
        ("v5x:2x2", "'v5x' is unknown; did you mean"),
        ("v5e:2x2x2", "v5e has 2 sides, e.g. v5e:4x4"),
        ("v5p:16x16", "v5p has 3 sides"),
        ("v5e:3x3", "9 chips do not fill whole hosts of 4"),
        ("v5e", "v5e has 2 sides"),
        ("v5e:0x4", "v5e has 2 sides"),
    ],
)
def test_a_topology_that_is_none_is_refused(topology, says):
    with pytest.raises(UserError, match=re.escape(says)):
        parse_topology(topology)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_slices_are_named_as_cloud_tpu_names_them(generation):
    shape = "2x2x1" if GENERATIONS[generation].dimensions == 3 else "2x2"
    name = parse_topology(f"{generation}:{shape}").accelerator_type
    assert name == {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}[generation]


def test_names_are_labels():
    assert dns_name("listopd", "lambda1e-05_seed7") == "listopd-lambda1e-05-seed7"
    for prefix in ("9x", "Grid", "-", "x" * 40):
        with pytest.raises(UserError, match="--name="):
            dns_name(prefix, "lambda1.0_seed7")


# --- TPU VMs ---

GCLOUD = """#!{python}
import pathlib, sys
home = pathlib.Path({home!r})
verb, resource = sys.argv[4:6]
with (home / "calls").open("a") as calls:
    calls.write(verb + " " + resource + chr(10))
state = home / resource
if verb == "describe":
    sys.exit(print(state.read_text()) if state.exists() else 1)
if verb == "delete":
    state.unlink()
if verb == "create":
    if (home / "full").exists():
        sys.exit("Traceback of gcloud" + chr(10) + "ERROR: quota exceeded")
    state.write_text("WAITING_FOR_RESOURCES")
"""


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """A gcloud that keeps the states of queued resources as files."""
    home = tmp_path / "cloud"
    home.mkdir()
    (home / "gcloud").write_text(GCLOUD.format(python=sys.executable, home=str(home)))
    (home / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:/usr/bin:/bin")
    return home


def vm_args(tmp_path, *options):
    setup = tmp_path / "setup.sh"
    setup.write_text("mount -t nfs 10.0.0.2:/share /mnt\ncd /opt/listopd_jax\n")
    return tpu_vm._parser().parse_args([*REQUIRED, "--zone=us-west4-a", f"--setup={setup}", *options])


def test_the_start_up_script_is_shell_and_runs_the_point_after_the_setup(grid, tmp_path):
    args = vm_args(tmp_path, "--project=mine")
    script = tpu_vm.startup_script(grid, "lambda1.0_seed42", "listopd-x", args.setup.read_text(), args)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert script.index("mount -t nfs") < script.index("python -m launch.point --root=/mnt/grid")
    assert (
        "queued-resources delete listopd-x --zone=us-west4-a --project=mine --force --quiet --async" in script
    )


def test_when_the_point_ends_the_first_host_alone_deletes_the_slice(grid, tmp_path, gcloud):
    """Run the script with stand-ins for curl (which tells which host it is) and for python."""
    args = vm_args(tmp_path)
    for code in (0, 2):
        for host, deletes in ((0, 1), (1, 0)):
            (gcloud / "calls").write_text("")
            (gcloud / "listopd-x").touch()
            metadata = f"case $* in *number) echo {host};; *endpoints) echo a:1:10.0.0.7,b:2:10.0.0.8;; esac"
            told = "$LISTOPD_HOST $JAX_PROCESS_ID $JAX_NUM_PROCESSES $JAX_COORDINATOR_ADDRESS"
            for name, body in (("curl", metadata), ("python", f"echo {told} $*; exit {code}")):
                (gcloud / name).write_text(f"#!/bin/bash\n{body}\n")
                (gcloud / name).chmod(0o755)
            script = tpu_vm.startup_script(grid, "lambda1.0_seed42", "listopd-x", f"cd {tmp_path}\n", args)
            ran = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=False)
            assert ran.returncode == code
            assert ran.stdout.startswith(f"{host} {host} 2 10.0.0.7:8476 -m launch.point"), ran.stderr
            assert (gcloud / "calls").read_text().count("delete listopd-x") == deletes


def test_resources_are_asked_for_once_and_anew_after_pre_emption(grid, tmp_path, gcloud):
    args = vm_args(tmp_path, "--spot")
    create = tpu_vm.create_command("listopd-x", tmp_path / "x.sh", parse_topology("v5e:16x16"), args)
    assert {"--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(
        create
    )
    assert tpu_vm.start("listopd-x", create, args) == "requested"
    assert tpu_vm.start("listopd-x", create, args) == "left alone, WAITING_FOR_RESOURCES"
    (gcloud / "listopd-x").write_text("SUSPENDED")
    assert tpu_vm.start("listopd-x", create, args) == "requested again"
    verbs = [line.split()[0] for line in (gcloud / "calls").read_text().splitlines()]
    assert verbs == ["describe", "create", "describe", "describe", "delete", "create"]
    (gcloud / "full").touch()
    with pytest.raises(UserError, match="queued-resources create listopd-y: ERROR: quota exceeded"):
        tpu_vm.start("listopd-y", [x.replace("listopd-x", "listopd-y") for x in create], args)


def test_without_gcloud_it_says_so(grid, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="gcloud is not installed here"):
        tpu_vm.start("listopd-x", ["gcloud"], vm_args(tmp_path))


# --- the commands ---


def command(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"launch.{module}", *arguments, "--config=configs/fashion.py:tiny",
         "--config.opd.lambdas=1.0,1.25"],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_gke_prints_a_list_for_kubectl():
    shown = command(
        "gke", "--root=/mnt/grid", "--stage=points", "--topology=v5e:4x4", "--image=i", "--claim=c"
    )
    made = json.loads(shown.stdout)
    assert made["kind"] == "List" and [x["metadata"]["name"] for x in made["items"]] == [
        "listopd-lambda1p0-seed0", "listopd-lambda1p25-seed0",
    ]  # fmt: skip


def test_tpu_vm_prints_commands_and_writes_their_scripts(tmp_path):
    (tmp_path / "setup.sh").write_text("true\n")
    shown = command(
        "tpu_vm", f"--root={tmp_path}/none", "--stage=common", "--topology=v5e:4x4", "--zone=z",
        f"--setup={tmp_path}/setup.sh", f"--scripts={tmp_path}/scripts",
    )  # fmt: skip
    (line,) = shown.stdout.splitlines()
    (script,) = [x.split("=", 2)[2] for x in shlex.split(line) if x.startswith("--metadata-from-file")]
    assert "--name=common" in pathlib.Path(script).read_text()


@pytest.mark.parametrize(
    ("module", "options", "says"),
    [
        (gke, ["--image=i"], "the following arguments are required: --claim"),
        (gke, ["--image=i", "--claim=c", "--mount=/data"], "must be a folder in the volume"),
        (gke, ["--image=i", "--claim=c", "--region=x"], "'--region=x' is not known"),
        (gke, ["--image=i", "--claim=c", "--format=yaml"], "argument --format: invalid choice: 'yaml'"),
        (tpu_vm, ["--zone=z", "--setup=absent.sh"], "--setup=absent.sh: cannot be read"),
    ],
)
def test_a_wrong_option_is_one_line(module, options, says):
    with pytest.raises(UserError, match=re.escape(says)):
        module.main([*REQUIRED, *options])


def documented_commands(path):
    """Arguments of each launch.gke and launch.tpu_vm that a page shows in full, its shell variables filled in."""
    text = (REPO / path).read_text("utf-8").replace("\\\n", " ")
    variables = dict(re.findall(r'^    ([A-Z]+)="([^"]*)"', text, flags=re.MULTILINE))
    for line in re.findall(r"^    python -m launch\.((?:gke|tpu_vm) [^>#\n]*)", text, flags=re.MULTILINE):
        words = shlex.split(string.Template(line).safe_substitute(variables))
        if "--config=…" not in words:
            yield [word for word in words if word != "…"]


DOCUMENTED = [x for page in ("README.md", "docs/running_on_pods.md") for x in documented_commands(page)]


def test_both_pages_show_both_stages_of_gke():
    stages = [word for words in DOCUMENTED if words[0] == "gke" for word in words if "--stage=" in word]
    assert stages == ["--stage=common", "--stage=points"] * 2


@pytest.mark.parametrize("words", DOCUMENTED, ids=" ".join)
def test_commands_of_the_documentation_are_accepted(words, tmp_path):
    (tmp_path / "setup.sh").write_text("true\n")
    module, *arguments = (word.replace("--setup=", f"--setup={tmp_path}/") for word in words)
    scripts = [f"--scripts={tmp_path}"] if module == "tpu_vm" else []
    shown = subprocess.run(
        [sys.executable, "-m", f"launch.{module}", *arguments, *scripts],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 0 and shown.stdout, shown.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--config.parallel.fsdp=32", "parallel.data*parallel.fsdp=256 must divide opd.batch_size=128"),
        (
            "--config.parallel.tensor=8 --config.parallel.fsdp=32",
            "parallel.data*parallel.fsdp=32 must divide sft.teacher.microbatch=8",
        ),
        ("--config.parallel.fsdp=3", "3 does not divide the 256 devices"),
    ],
)
def test_a_mesh_that_every_pod_would_refuse_is_refused_before_any_starts(monkeypatch, flags, says):
    config = fashion.get_config("paper")
    for flag in flags.split():
        name, _, size = flag.removeprefix("--config.parallel.").partition("=")
        config.parallel[name] = int(size)
    monkeypatch.setattr(cli, "checked_config", lambda _: config)
    with pytest.raises(UserError, match=re.escape(says)):
        gke.main([*REQUIRED, "--image=i", "--claim=c"])
