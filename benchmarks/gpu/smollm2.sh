#!/usr/bin/env bash
# SmolLM2-135M on real reviews on one GPU: does the cliff that is forecast come in training, and what does a guard do?
# The ablations of configs/natural.py, four at a time. A prediction is locked as soon as it is there, before any student.
#   OUT=FOLDER GGUF=FILE DATA=womens_clothing_reviews.csv.zip [WHEELS=FOLDER] [SECONDS_LEFT=450] [ROOT=FOLDER] \
#   bash benchmarks/gpu/smollm2.sh [--config.field=value …]
set -uo pipefail
: "${OUT:?set OUT to a folder}" "${GGUF:?set GGUF to the file of the model}" "${DATA:?set DATA to the reviews}"
mkdir -p "$OUT"
end=${SECONDS_LEFT:-450}
room=$(df -BG --output=avail /dev/shm 2>/dev/null | tail -1 | tr -dc 0-9) # 16 checkpoints of 1.6 GB at one time
[ "${room:-0}" -ge 40 ] && fast=/dev/shm || fast=${TMPDIR:-/tmp}
ROOT=${ROOT:-$(mktemp -d -p "$fast")}
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d) # not in /dev/shm, from which libraries may not be loaded
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 2
  export PYTHONPATH=$site:$PWD
fi
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=1 XDG_CACHE_HOME=$ROOT/cache
export JAX_COMPILATION_CACHE_DIR=$ROOT/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
python3 -c "from listopd_jax.models.build import weights_folder; print(weights_folder('$GGUF'))" || exit 2

ablation() { # NAME TEACHER STUDENT --config.field=value …
  local name=$1 teacher=$2 student=$3 began=$SECONDS
  shift 3
  mkdir -p "$ROOT/runs/$name"
  timeout -k 8 $((end > SECONDS ? end - SECONDS : 1)) python3 -m listopd_jax.main "--config=configs/natural.py:$name" \
    "--workdir=$ROOT/runs/$name" "--config.data.path=$DATA" "--config.tokenizer.path=$GGUF" \
    "--config.teacher.weights=$teacher" "--config.student.weights=$student" "$@" >"$ROOT/runs/$name.log" 2>&1
  echo "{\"ablation\": \"$name\", \"exit\": $?, \"began\": $began, \"ended\": $SECONDS}" | tee -a "$OUT/lines.jsonl"
}
of_early() { # NAME --config.field=value …: with the checkpoints of the ablation `early`
  local folder=$ROOT/runs/early/export name=$1
  shift
  ablation "$name" "$folder/sft_teacher" "$folder/sft_student" "$@" --config.sft.{teacher,student}.{steps=0,epochs=0.0}
}
until_there() { # COMMAND …: wait until it succeeds, but not past the end
  until "$@" 2>/dev/null; do [ $SECONDS -lt "$end" ] && sleep 1 || return 1; done
}
lock() { # NAME
  until_there test -s "$ROOT/runs/$1/predictions.json" &&
    JAX_PLATFORMS=cpu python3 -m listopd_jax.prereg curve "--workdir=$ROOT/runs/$1" "--out=$ROOT/locks/$1.json" \
      >"$ROOT/runs/$1.lock.log" 2>&1
}
keep() { # the small files of all ablations so far; tar returns 1 for a log that grew meanwhile
  (cd "$ROOT" && find runs locks -type f \( -path '*/checkpoints/*' -o -path '*/export/*' -o -path '*/data/*' \
    -o -path '*/tensorboard/*' \) -prune -o -type f \( -name '*.json' -o -name '*.jsonl' -o -name '*.log' \
    -o -name report.html \) -print0 | tar --null -czf "$OUT/part" -T -)
  [ $? -le 1 ] && mv "$OUT/part" "$OUT/runs.tgz"
}
thin() { # a student that is evaluated needs no checkpoint
  local folder
  for folder in "$ROOT"/runs/*/checkpoints/opd_*; do
    grep -qs "\"${folder##*/}\"" "${folder%/checkpoints/*}/results.json" && rm -rf "$folder"
  done
}

mkdir -p "$ROOT/locks" "$ROOT/runs"
(ablation early "$GGUF" "$GGUF" "$@" && of_early more "$@") &
jobs=$!
ablation late "$GGUF" "$GGUF" "$@" &
jobs+=" $!"
lock early &
jobs+=" $!"
lock late &
jobs+=" $!"
until_trained() { until_there grep -q '"sft_student"' "$ROOT/runs/early/results.json"; }
(until_trained && of_early forward "$@") &
jobs+=" $!"
(ablation independent "$GGUF" "$GGUF" "$@" && until_trained && of_early warm "$@" && of_early guarded "$@" && of_early sampled "$@") &
jobs+=" $!"
(while sleep 20; do keep && thin; done) >"$ROOT/keep.log" 2>&1 &
keeping=$!
# shellcheck disable=SC2086 # the numbers of several processes
wait $jobs
kill $keeping
wait $keeping 2>/dev/null
nvidia-smi --query-gpu=name,memory.used --format=csv,noheader >>"$OUT/lines.jsonl"
keep
