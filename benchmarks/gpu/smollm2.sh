#!/usr/bin/env bash
# SmolLM2-135M on real reviews on one GPU: does a cliff come by itself, where, and what a guard does. Four grids at once,
# each with its own SFT, calibration and forecast; every result is on disk as soon as it is there.
#   OUT=FOLDER GGUF=FILE DATA=womens_clothing_reviews.csv.zip [WHEELS=FOLDER] \
#   [SECONDS_LEFT=660] [ARMS="plain guarded"] bash benchmarks/gpu/smollm2.sh [--config.field=value …]
set -uo pipefail
: "${OUT:?set OUT to a folder}" "${GGUF:?set GGUF to the file of the model}" "${DATA:?set DATA to the reviews}"
mkdir -p "$OUT"
ROOT=${ROOT:-$(mktemp -d)}
if [ -n "${WHEELS:-}" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$ROOT/site" "$WHEELS"/*.whl || exit 2
  export PYTHONPATH=$ROOT/site:$PWD
fi
export XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_COMPILATION_CACHE_DIR=$ROOT/compiled TF_CPP_MIN_LOG_LEVEL=1 XDG_CACHE_HOME=$ROOT
python3 -c "from listopd_jax.models.build import weights_folder; print(weights_folder('$GGUF'))" || exit 2

common=(--config=configs/fashion.py:smollm2 "--config.data.path=$DATA" "--config.tokenizer.path=$GGUF"
  "--config.teacher.weights=$GGUF" "--config.student.weights=$GGUF" --config.train.export=False "$@")

grid() { # NAME --config.field=value …
  local name=$1 began=$SECONDS
  shift
  timeout -k 10 "${SECONDS_LEFT:-660}" python3 -m launch.local "--root=$ROOT/$name" --processes=5 "${common[@]}" "$@" \
    >"$OUT/$name.out" 2>&1
  echo "{\"grid\": \"$name\", \"exit\": $?, \"seconds\": $((SECONDS - began))}" | tee -a "$OUT/lines.jsonl"
  python3 -m launch.gather "--root=$ROOT/$name" >>"$OUT/$name.out" 2>&1
}

arms() {
  case $1 in
  plain) grid plain ;;
  guarded) grid guarded --config.opd.guard.margin=1.25 --config.opd.lambdas=3.0 ;;
  full_vocab) grid full_vocab --config.opd.estimator=full_vocab --config.opd.ratio=none --config.opd.lambdas=2.0,3.0 ;;
  independent) grid independent --config.sft.teacher.seed=2 --config.opd.lambdas=1.0,2.0,3.0 ;;
  zero_shot) timeout 200 python3 -m listopd_jax.evaluate "--weights=$GGUF" "--workdir=$ROOT/zero_shot" "${common[@]}" \
    >"$OUT/zero_shot.out" 2>&1 ;;
  esac
}
for arm in ${ARMS:-plain guarded full_vocab independent zero_shot}; do arms "$arm" & done
wait
nvidia-smi --query-gpu=name,memory.used --format=csv,noheader >>"$OUT/lines.jsonl"
cd "$ROOT" && find . \( -name results.json -o -name calibration.json -o -name metrics.jsonl -o -name report.html \
  -o -name examples.json -o -name config.json -o -name '*.log' \) -not -path '*/compiled/*' -not -path './listopd_jax/*' \
  -not -path './site/*' -print0 | tar --null -czf "$OUT/runs.tgz" -T -
