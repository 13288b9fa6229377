"""One of two processes, for test_parallel_hosts.py: `main` with what it does, and jax's address in the environment."""

import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from listopd_jax.config import defaults
from listopd_jax.errors import UserError
from listopd_jax.parallel import hosts
from listopd_jax.parallel.mesh import configured_mesh, use_mesh


def agree() -> None:
    """Rows read apart add up to one batch, values of process 0 reach all, and files are written once."""
    with use_mesh(configured_mesh({"data": -1, "fsdp": 2, "tensor": 1})):
        rows = hosts.local_rows(8)
        assert len(rows) == 4
        batch = hosts.global_batch({"x": np.arange(24.0).reshape(8, 3)[rows]}, 8)
        whole = hosts.global_batch({"x": np.arange(24.0).reshape(8, 3)}, 8)  # as both packed it
        for x in (batch["x"], whole["x"]):
            np.testing.assert_array_equal(hosts.gather(x), np.arange(24.0).reshape(8, 3))
        assert float(jnp.sum(batch["x"])) == 276
        assert hosts.from_main(lambda: {"process": jax.process_index()}) == {"process": 0}
        with hosts.main_first():
            print(f"process {jax.process_index()} read {rows.tolist()}", flush=True)


def wait(victim: int, how: int) -> None:
    """Collectives for ever, until process `victim` goes: killed, or stopped by a mistake of its user."""
    for i in range(10**6):
        hosts.from_main(lambda: 0)
        if i == 3 and jax.process_index() == victim:
            print("going", flush=True)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("field=3: is wrong")
        time.sleep(0.05)


def main(argv: list[str]) -> int:
    _, what, *arguments = argv
    parallel = defaults().parallel
    if what == "agree" and arguments:
        parallel.timeout_s = int(arguments[0])
    try:
        with hosts.initialize_distributed(parallel):
            agree() if what == "agree" else wait(int(arguments[0]), arguments[1])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return hosts.leave(2, str(e))
    return 0
