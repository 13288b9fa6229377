"""Train a grid while it is killed, stopped, and its disk and files fail; its results must be those of a calm run.

    bash tests/soak.sh --out=docs/results/soak.json          # root, Linux: it mounts a small tmpfs; half an hour

Every fault comes at a moment drawn anew (`--seed` draws the same ones again, as far as the machine runs alike). After
each the same command is given again, as a user would. A job that comes to its end is compared with the calm run and
begun anew, until there were `--faults` in all and as many of each kind. Exit code 1: a result differs, a fault was
answered by a traceback or by another exit code than its own, or a job did not end.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from processes import NO_LAMBDA, command

from listopd_jax.report.wording import markdown

REPO = pathlib.Path(__file__).resolve().parents[1]
DISK_MIB = 256
PATIENCE = 300  # seconds that a process has to notice a fault
BARS = ("it/s]", "s/it]", "step/s", "?, ?")
KEPT = ("results.json", "examples.json", "errors.json", "calibration.json")
GRID = (
    "--config.opd.lambdas=1.0,1.5,2.0",
    "--config.opd.seeds=0,1",
    "--config.data.source=clothing",
    "--config.task.k=4",
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a job lives: a small disk of its own, and the file that it reads."""

    disk: pathlib.Path
    reviews: pathlib.Path

    @property
    def workdir(self) -> pathlib.Path:
        """Of the job that is disturbed."""
        return self.disk / "job"

    @property
    def said(self) -> pathlib.Path:
        """What the last process wrote to stderr."""
        return self.reviews.with_name("said")

    def start(self, workdir: pathlib.Path) -> subprocess.Popen:
        """The command of a user."""
        words = command(workdir, *NO_LAMBDA, *GRID, f"--config.data.path={self.reviews}")
        with self.said.open("w") as said:
            return subprocess.Popen(words, cwd=REPO, stdout=subprocess.DEVNULL, stderr=said)

    def last_words(self, job: subprocess.Popen) -> list[str]:
        """Wait for `job`, and what it said without its progress bars."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(PATIENCE)
        if job.returncode is None:
            job.kill()
            job.wait()
        said = self.said.read_text(errors="replace").replace(
            str(self.disk.parent), ""
        )  # a folder of this run only
        lines = said.splitlines()
        return [line for line in lines if line.strip() and not any(bar in line for bar in BARS)]


@dataclasses.dataclass(frozen=True)
class Fault:
    """What was done when, and what the user saw: the exit code and the last line."""

    kind: str
    after_s: float
    code: int
    said: str
    ok: bool


# --- faults: each a context in which the process `job` runs into it ---


@contextlib.contextmanager
def kill_9(place: Place, job: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """No process can answer this; the next start must be right."""
    job.send_signal(signal.SIGKILL)
    yield job


@contextlib.contextmanager
def sigterm(place: Place, job: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """A scheduler's request to stop."""
    job.send_signal(signal.SIGTERM)
    yield job


@contextlib.contextmanager
def full_disk(place: Place, job: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """A file takes what room there is."""
    filler = place.disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(2**20)) == 2**20:
            pass
    yield job
    filler.unlink()


@contextlib.contextmanager
def read_only(place: Place, job: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """No folder of the workdir takes a new file, or gives one up."""
    until(place.workdir.exists, job)
    subprocess.run(["chattr", "+i", place.workdir], check=True)  # tmpfs knows this since Linux 6.6
    folders = [place.workdir, *(p for p in place.workdir.rglob("*") if p.is_dir())]
    subprocess.run(["chattr", "+i", *folders], check=False)  # temporary ones may be gone by now
    yield job
    subprocess.run(["chattr", "-i", *folders], check=False)


@contextlib.contextmanager
def damaged_checkpoint(place: Place, job: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """kill -9, and the largest file of the newest checkpoint has other bytes in its middle."""
    job.send_signal(signal.SIGKILL)
    job.wait()
    steps = [p for p in place.workdir.glob("checkpoints/*/*") if p.name.isdecimal()]
    if steps:
        newest = max(steps, key=lambda p: p.stat().st_mtime)
        victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        content = bytearray(victim.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 64] = random.randbytes(len(content[middle : middle + 64]))
        victim.write_bytes(content)
    yield job


@contextlib.contextmanager
def other_input(place: Place, job: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """kill -9, and the reviews are others when the command is given again.

    Not before a model was made from them: until then they may change.
    """
    until((place.workdir / "checkpoints").exists, job)
    job.send_signal(signal.SIGKILL)
    job.wait()
    before = place.reviews.read_text()
    place.reviews.write_text(before.replace("review 3 of", "review three of"))
    yield place.start(place.workdir)
    place.reviews.write_text(before)


def until(happened: Callable[[], bool], job: subprocess.Popen) -> None:
    """Wait for it while `job` lives."""
    while not happened() and job.poll() is None:
        time.sleep(0.05)


FAULTS: dict[str, tuple[Callable, tuple[int, ...], str]] = {
    "kill -9": (kill_9, (-signal.SIGKILL,), "nothing"),
    "SIGTERM": (sigterm, (0, -signal.SIGTERM), "the same command resumes"),
    "full disk": (full_disk, (0, 2), "error: "),
    "read-only workdir": (read_only, (0, 2), "error: "),
    "damaged checkpoint": (damaged_checkpoint, (-signal.SIGKILL,), "nothing"),
    "other input file": (other_input, (2,), "error: "),
}
"""What is done, the exit codes that answer it, and what the last line then has in it, unless a signal ended the job."""


def disturb(place: Place, kind: str, rng: random.Random, span: float) -> Fault | None:
    """Start the job, let the fault of `kind` happen within `span` seconds, and see how the job ends.

    None if it came to its end before; RuntimeError if that was no good one.
    """
    cause, codes, says = FAULTS[kind]
    job, moment = place.start(place.workdir), rng.uniform(0, span)
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.wait(moment)
    if job.returncode is not None:  # it came to its end before
        _ended_well(place, place.workdir, job)
        return None
    with cause(place, job) as seen:
        lines = place.last_words(seen)
    code, last = seen.returncode, lines[-1] if lines else ""
    answered = code < 0 or says in last or finished(place.workdir)
    ok = code in codes and answered and not any("Traceback" in line for line in lines)
    if not ok:
        print("\n".join(lines), file=sys.stderr)  # the next process writes over it
    return Fault(kind, round(moment, 2), code, last, ok)


# --- the comparison ---


def finished(workdir: pathlib.Path) -> bool:
    """Whether the job there came to its end: the report is the last that it writes."""
    return (workdir / "report.html").exists()


def facts(workdir: pathlib.Path) -> dict[str, object]:
    """What a calm run and a disturbed one must have in common: every record, every step's metrics but its speed."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
    return {"metrics": timeless} | {
        name: (workdir / name).read_text() for name in KEPT if (workdir / name).exists()
    }


def to_the_end(place: Place, workdir: pathlib.Path) -> None:
    """Run the job without a fault; RuntimeError, with its last words, if it does not end well."""
    job = place.start(workdir)
    job.wait()
    _ended_well(place, workdir, job)


def _ended_well(place: Place, workdir: pathlib.Path, job: subprocess.Popen) -> None:
    if job.returncode or not finished(workdir):
        raise RuntimeError(f"exit code {job.returncode}: {place.said.read_text()[-2000:]}")


def soak(place: Place, wanted: int, seed: int) -> tuple[list[Fault], int]:
    """All faults, and how many whole jobs were disturbed by them; RuntimeError if the results of one differ."""
    rng, faults, jobs = random.Random(seed), [], 0
    begun = time.monotonic()
    to_the_end(place, place.disk.parent / "calm")
    span, calm = (time.monotonic() - begun) * 0.6, facts(place.disk.parent / "calm")
    waiting = [
        kind for i in range(-(-wanted // len(FAULTS))) for kind in rng.sample(list(FAULTS), len(FAULTS))
    ]
    while waiting or place.workdir.exists():
        if waiting:
            fault = disturb(place, waiting[0], rng, span)
            if fault is not None:
                faults.append(fault)
                waiting.pop(0)
                print(json.dumps(dataclasses.asdict(fault), ensure_ascii=False), flush=True)
        elif not finished(place.workdir):
            to_the_end(place, place.workdir)
        if finished(place.workdir):
            if facts(place.workdir) != calm:
                raise RuntimeError("the results of a disturbed job are not those of the calm one")
            shutil.rmtree(place.workdir)
            jobs += 1
    return faults, jobs


def table(faults: list[Fault]) -> str:
    """Per kind: how often, and what the user saw."""
    rows = []
    for kind in FAULTS:
        of = [fault for fault in faults if fault.kind == kind]
        codes = collections.Counter(fault.code for fault in of)
        said = collections.Counter(fault.said for fault in of if fault.said)
        seen = ", ".join(f"{code} ({n})" for code, n in sorted(codes.items()))
        rows.append((kind, str(len(of)), seen, said.most_common(1)[0][0] if said else ""))
    return markdown(("fault", "times", "exit code (times)", "most frequent last line"), rows)


def write_reviews(path: pathlib.Path) -> None:
    """Sixteen products of twelve short reviews, in the form of the clothing file."""
    head = "Clothing ID,Review Text,Positive Feedback Count,Department Name"
    rows = [f"{i},review {j} of item {i} is fine,{(i * j) % 9},Tops" for i in range(16) for j in range(12)]
    path.write_text("\n".join([head, *rows]) + "\n")


@contextlib.contextmanager
def small_disk() -> Iterator[Place]:
    """A folder with a tmpfs in it, both gone at the end."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="listopd_soak_"))
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", disk], check=True)
    try:
        write_reviews(folder / "reviews.csv")
        yield Place(disk, folder / "reviews.csv")
    finally:
        subprocess.run(["umount", "-l", disk], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Parse, disturb, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", type=int, default=42, help="in all, an equal number of each kind")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of the moments")
    parser.add_argument("--out", type=pathlib.Path, help="the JSON file to write")
    args = parser.parse_args()
    random.seed(args.seed)
    with small_disk() as place:
        faults, jobs = soak(place, args.faults, args.seed)
    found = {
        "seed": args.seed,
        "jobs": jobs,
        "identical": True,
        "faults": [dataclasses.asdict(f) for f in faults],
    }
    if args.out:
        args.out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(table(faults))
    wrong = [fault for fault in faults if not fault.ok]
    print(f"{len(faults)} faults, {jobs} jobs, all identical to the calm run; {len(wrong)} answered wrongly")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
