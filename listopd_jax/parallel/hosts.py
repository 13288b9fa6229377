"""Many hosts: one process each, started together; who reads what, who writes, and how all stop when one is gone.

Every process runs the same program (SPMD). Process 0 alone writes files; what it reads and others must agree on goes
through `from_main`. Each keeps a TCP line to process 0, apart from jax's own: if it breaks, or brings the news that a
process has stopped, the others print one line that names that process and exit, instead of waiting in a collective. The
kernel closes the line of a killed process at once; for a host that is cut off it takes KEEPALIVE, about 25 s.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from listopd_jax import files
from listopd_jax.errors import Interrupted, UserError, end_now, print_error

CLUSTERS = (
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
)  # processes of a job that jax detects
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # s, s, probes
PATIENCE = 60.0  # s that a broken collective waits for the line to say why
GONE = 1  # exit code where another process is gone

_process, _count = 0, 1
_lines: list[socket.socket] = []
_followers: list[threading.Thread] = []
_ending = threading.Event()  # this process is on its way out


def is_main() -> bool:
    """Whether this process is the one that writes; true if there is only one."""
    return _process == 0


@contextlib.contextmanager
def initialize_distributed(parallel: Mapping[str, Any]) -> Iterator[None]:
    """While inside, this process is one of those that config section `parallel` or the environment asks for.

    Coordinator, number and id are taken from the section, else from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, else found by jax itself under SLURM, Open MPI and on TPU pods; with none of them nothing happens.
    Raises UserError if the others are not there within `parallel.timeout_s`.
    """
    setting = _setting(parallel)
    if setting is None:
        yield
        return
    _start(setting, parallel["timeout_s"])
    try:
        yield
    except (UserError, Interrupted, KeyboardInterrupt):
        raise
    except (
        Exception
    ):  # most likely a collective that broke: the line knows of which process, and ends this one
        if _count > 1:
            time.sleep(PATIENCE)
        raise
    _tell({"process": _process, "done": True})


def alone() -> bool:
    """Whether this process is the only one of its job."""
    return _count == 1


def leave(code: int, text: str) -> int:
    """The exit code of a process that stops early; if there are others, tell them why and exit at once.

    With code 0, a requested stop that most likely reaches all of them, it waits for the others to save.
    """
    if alone():
        return code
    _ending.set()
    _tell({"process": _process, "code": code, "text": f"stopped: {text}"})
    if code == 0:
        for follower in _followers:
            follower.join(PATIENCE)
    # Without jax's own shutdown, which would wait for processes that are gone.
    end_now(code)
    return code


def _setting(parallel: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize; None for a process on its own."""
    env = os.environ
    coordinator = parallel["coordinator"] or env.get("JAX_COORDINATOR_ADDRESS", "")
    if coordinator:
        number = parallel["num_processes"] or _number("JAX_NUM_PROCESSES", 0)
        index = parallel["process_id"] if parallel["process_id"] >= 0 else _number("JAX_PROCESS_ID", -1)
        if number and not 0 <= index < number:
            raise UserError(
                f"parallel.process_id={index}: with a coordinator, give each of the {number} processes its number "
                "from 0 on, also as JAX_PROCESS_ID"
            )
        known = {"num_processes": number, "process_id": index} if number else {}
        return {"coordinator_address": coordinator, **known}
    pod = "," in env.get("TPU_WORKER_HOSTNAMES", "")
    return {} if pod or any(_number(name, 1) > 1 for name in CLUSTERS) else None


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.lstrip("-").isdigit():
        raise UserError(f"{name}={value}: must be a whole number")
    return int(value)


def _start(setting: dict[str, Any], timeout: int) -> None:
    """jax.distributed with explicit time limits, and the lines to process 0."""
    global _process, _count
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its log of lost peers: the line says it in one
    import jax

    late = threading.Timer(timeout, _late, [setting, timeout])  # jax itself would abort with a stack trace
    late.start()
    try:
        jax.distributed.initialize(
            **setting, initialization_timeout=2 * timeout + 30, heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )  # fmt: skip
    except (RuntimeError, ValueError) as e:
        raise UserError(_not_joined(setting, str(e))) from e
    finally:
        late.cancel()
    _process, _count = jax.process_index(), jax.process_count()
    files.run_on_process_0(is_main())
    if _count > 1:
        _connect(jax)


def _late(setting: dict[str, Any], timeout: int) -> None:
    print_error(_not_joined(setting, f"waited {timeout} s"))
    end_now(2)


def _not_joined(setting: dict[str, Any], problem: str) -> str:
    if "must be called before" in problem:
        return "parallel: name the preset, --config=configs/NAME.py:PRESET; auto looks at the devices of one host"
    where = setting.get("coordinator_address", "found by jax")
    reason = " ".join(problem.split())[:160]
    return f"parallel: not all processes met at the coordinator {where} ({reason}); start them all, with one address"


# --- the lines ---


def _connect(jax: Any) -> None:
    """Lines between process 0 and each other one, with a thread that listens on each."""
    from jax._src import distributed

    # The port is open to the network. Whoever connects must send the word, which only these processes know.
    listener, word = socket.create_server(("", 0)) if is_main() else None, secrets.token_hex(16)
    port, word = from_main(lambda: (listener.getsockname()[1], word))
    if listener is None:
        host = distributed.global_state.coordinator_address.rsplit(":", 1)[0].strip("[]")
        line = socket.create_connection((host, port), timeout=PATIENCE)
        line.sendall(f"{word} {_process}\n".encode())
        _listen(line, 0)
        return
    while len(_lines) < _count - 1:
        listener.settimeout(PATIENCE)
        line, _ = listener.accept()
        line.settimeout(PATIENCE)
        said = line.makefile("rb", buffering=0).readline(100).decode(errors="replace").split()
        if len(said) == 2 and secrets.compare_digest(said[0], word) and said[1].isdigit():
            _listen(line, int(said[1]))
    listener.close()


def _listen(line: socket.socket, peer: int) -> None:
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    _lines.append(line)
    _followers.append(threading.Thread(target=_follow, args=(line, peer), daemon=True))
    _followers[-1].start()


def _follow(line: socket.socket, peer: int) -> None:
    """Wait for news of `peer`, or by way of process 0 of another; end this process unless the peer is done."""
    news = {"process": peer, "code": GONE, "text": "is gone"}
    with contextlib.suppress(OSError), line.makefile("rb") as said:
        for text in said:
            news = json.loads(text)
            break
    # Code 0 is a requested stop. This process most likely got the request too and is saving.
    if news.get("done") or (news["code"] == 0 and _ending.wait(PATIENCE)):
        return
    if is_main():
        _tell(news, skip=line)
    print_error(
        f"process {news['process']} of {_count} {news['text']}; the same command resumes from what is saved"
    )
    end_now(news["code"])


def _tell(news: dict[str, Any], skip: socket.socket | None = None) -> None:
    for line in _lines:
        with contextlib.suppress(OSError):
            if line is not skip:
                line.sendall((json.dumps(news) + "\n").encode())


# --- agreement ---


def from_main(compute: Callable[[], Any]) -> Any:
    """The result of `compute` on process 0, on every process; JSON values. Every process calls it at the same point."""
    if alone():
        return compute()
    text = np.frombuffer(json.dumps(compute()).encode() if is_main() else b"", np.uint8)
    # The length first: an all-gather needs the same shape on every process.
    size = int(_all_gather(np.int32(len(text)))[0])
    text = np.pad(text, (0, size - len(text))) if len(text) <= size else text[:size]
    return json.loads(_all_gather(text)[0].tobytes())


def anywhere(flag: bool) -> bool:
    """Whether `flag` is set on any host; every host calls it at the same point."""
    return flag if alone() else bool(_all_gather(np.array(flag)).any())


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Process 0 goes through the block before the others enter it: they find what it made."""
    if not is_main():
        _all_gather(np.int32(0))
    yield
    if is_main() and _count > 1:
        _all_gather(np.int32(0))


def gather(x: Any) -> np.ndarray:
    """The whole array, on the host of every process; each calls it with its own part."""
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _all_gather(x: np.ndarray) -> np.ndarray:
    """The `x` of every process, stacked."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x))


# --- rows ---


def local_rows(batch_size: int) -> np.ndarray | None:
    """The rows of a global batch that devices of this process hold, ascending; None: all of them."""
    sharding = _row_sharding(batch_size)
    if sharding is None:
        return None
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def global_batch(batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, Any]:
    """Device arrays of the global batch, of whose rows this process has all, or those that `local_rows` names."""
    import jax
    import jax.numpy as jnp

    if _row_sharding(batch_size) is None:
        return {name: jnp.asarray(x) for name, x in batch.items()}
    rows = local_rows(batch_size)

    def put(x: np.ndarray):
        def piece(index):
            start, stop, _ = index[0].indices(batch_size)
            at = start if len(x) == batch_size else np.searchsorted(rows, start)
            return x[at : at + stop - start][(slice(None), *index[1:])]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), _row_sharding(batch_size), piece)

    return {name: put(np.asarray(x)) for name, x in batch.items()}


def _row_sharding(batch_size: int) -> Any:
    from jax.sharding import NamedSharding

    from listopd_jax.parallel import rules

    mesh = rules.context_mesh()
    return None if mesh is None else NamedSharding(mesh, rules.spec(("batch",), (batch_size,), mesh))
