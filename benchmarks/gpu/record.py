"""The headline of one run of `python -m benchmarks.opd_step --preset=paper --json` as one flat JSON object.

python -m benchmarks.gpu.record RESULT.json [COMMAND …] > benchmarks/results/h100.json
"""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def headline(result: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Seconds of each stage and the two goals.

    update_mfu: FLOPs of scoring and update, without what the backward pass recomputes, over time and the data sheet's
    peak. rollout_floor_share: the floor of the plain rollout over its measured time.
    """
    stages = {row["stage"]: row for row in result["stages"]}
    seconds = {
        f"{name}_s": round(stages[name]["seconds"], 4) for name in ("step", "prefill", "decode", "update")
    }
    return {
        "device": result["device"],
        "versions": result["versions"],
        "command": command,
        "load": result["load"],
        "microbatch": result["microbatch"],
        "remat": result["remat"],
        **{key: result[key] for key in ("drafts", "confirmed", "tokens_per_step") if result.get("drafts")},
        **seconds,
        "update_mfu": round(stages["update"]["mfu"], 4),
        "rollout_floor_share": round(stages["rollout"]["floor_share"], 4),
        "step_floor_s": round(stages["step"]["floor_s"], 4),
        "peak_gib": round(result["memory_bytes"] / 2**30, 2),
        "steps": result["steps"],
        "spread_s": [round(stages["step"][key], 4) for key in ("seconds_low", "seconds_high")],
    }


def main(argv: Sequence[str]) -> int:
    """Print the headline of the file named first; the rest is the command that made it."""
    result = json.loads(pathlib.Path(argv[0]).read_text(encoding="utf-8"))
    print(json.dumps(headline(result, " ".join(argv[1:])), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
