#!/usr/bin/env bash
# Search and compile the points of docs/planner.md, one at a time, into docs/planner/*.json; one that is there is skipped.
#     docs/planner_points.sh [FOLDER]        minutes of a core per point; PYTHON=... chooses the interpreter
set -u
cd "$(dirname "$0")/.."
out=${1:-docs/planner}
mkdir -p "$out"
while read -r preset topology; do
    file=$out/$preset-${topology/:/-}.json
    [ -s "$file" ] && continue
    "${PYTHON:-python}" -m listopd_jax.plan --json --search --compiles=3 \
        --config=configs/fashion.py:"$preset" --topology="$topology" > "$file.part"
    # 0: fits, 1: does not; anything else, or nothing printed, is not a plan.
    if [ $? -le 1 ] && [ -s "$file.part" ]; then mv "$file.part" "$file"; else rm -f "$file.part"; echo "$file: failed" >&2; fi
done <<'POINTS'
paper v5p:2x2x2
paper v5e:16x16
paper_8b v5p:4x4x4
paper_8b v6e:16x16
paper_8b v5e:16x16
paper v6e:2x4
paper v5e:8x8
paper v5p:4x8x8
paper_8b v5p:4x8x8
paper v5e:2x4
paper v5p:4x4x4
paper v6e:16x16
paper_8b v5p:2x2x2
paper_8b v6e:2x4
paper_8b v5e:2x4
POINTS
