#!/usr/bin/env bash
# Compile the points of docs/planner.md, one at a time, into docs/planner/*.json; a point that is there is skipped.
#     docs/planner_points.sh [FOLDER]        minutes of a core a point; PYTHON=... chooses the interpreter
set -u
cd "$(dirname "$0")/.."
out=${1:-docs/planner}
mkdir -p "$out"
while read -r preset topology fsdp tensor microbatch; do
    file=$out/$preset-${topology/:/-}.json
    [ -s "$file" ] && continue
    nice -n 5 "${PYTHON:-python}" -m listopd_jax.plan --json \
        --config=configs/fashion.py:"$preset" --topology="$topology" \
        --config.parallel.data=1 --config.parallel.fsdp="$fsdp" --config.parallel.tensor="$tensor" \
        --config.opd.microbatch="$microbatch" --config.sft.teacher.microbatch="$microbatch" \
        --config.sft.student.microbatch="$microbatch" > "$file.part"
    # 0: fits, 1: does not; anything else is no plan.
    if [ $? -le 1 ]; then mv "$file.part" "$file"; else rm -f "$file.part"; echo "$file: failed" >&2; fi
done <<'POINTS'
paper v5p:2x2x2 8 1 8
paper_8b v5p:4x4x4 16 4 16
paper v5e:16x16 32 8 32
paper_8b v6e:16x16 32 8 32
paper v6e:8x8 16 4 16
paper_8b v5e:16x16 32 8 32
POINTS
