#!/usr/bin/env bash
# One short loan of a GPU, in order of worth: EC's step with drafts, correctness next to a small job, the kernels of decoding.
# Every line is a process with a limit of its own, and its result is written at once. From the repository's root:
#   OUT=FOLDER [WHEELS=FOLDER] [PARTS="step correct"] bash benchmarks/gpu/run.sh      5 to 6 minutes for all parts
#   OUT=FOLDER SMALL=1 bash benchmarks/gpu/run.sh                                     the same lines at a CPU's size
set -uo pipefail
: "${OUT:?set OUT to a folder}"
mkdir -p "$OUT"
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 2
  export PYTHONPATH=$site:$PWD
fi
if [ -n "${SMALL:-}" ]; then
  preset=paper_small batch=4 small=--small
else
  preset=paper batch=64 small= XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}
  export XLA_PYTHON_CLIENT_MEM_FRACTION JAX_PLATFORMS=cuda,cpu
fi
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)} # the lines share programs
export TF_CPP_MIN_LOG_LEVEL=1 PYTHONUNBUFFERED=1

line() { # NAME SECONDS COMMAND…
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.out" 2>"$OUT/$name.err"
  echo "{\"line\": \"$name\", \"exit\": $?, \"seconds\": $((SECONDS - began))}" | tee -a "$OUT/lines.jsonl"
}

both() { # NAME SECONDS COMMAND… of two lines that share the device, for what is not timed
  XLA_PYTHON_CLIENT_PREALLOCATE=false line "$@"
}

drafted=(--drafts=7 --confirmed=.83) # the rate at which trained students confirm drafts: benchmarks/results/drafts_cpu.json
shape=("--preset=$preset" "--microbatch=$batch" --remat=attention)
step=(python3 -m benchmarks.opd_step "${shape[@]}" "${drafted[@]}" --steps=3 --json)

part() {
  case $1 in
  step)
    line step 170 "${step[@]}"
    python3 -m benchmarks.gpu.record "$OUT/step.out" "${step[@]/python3/python}" >"$OUT/headline.json"
    ;;
  correct) # three processes, and a small job next to them: nothing here is timed
    for check in attention decoder step; do both "correct_$check" 150 python3 -m benchmarks.gpu.correct $small --only=$check & done
    both job 120 python3 -m listopd_jax.main --config=configs/fashion.py:tiny "--workdir=$(mktemp -d)/job" \
      --config.sft.teacher.steps=20 --config.sft.student.steps=20 --config.opd.steps=3 --config.opd.lambdas=1.2 \
      --config.forecast.lambdas=1.2 --config.evaluation.max_lists=32 --config.data.synthetic.products=200 &
    wait
    ;;
  profile_update) line profile_update 90 python3 -m benchmarks.gpu.profile update "${shape[@]}" ;;
  profile_drafts) line profile_drafts 70 python3 -m benchmarks.gpu.profile decode "--preset=$preset" "${drafted[@]}" ;;
  *) echo "PARTS: '$1' is not one of step, correct, profile_update, profile_drafts" >&2 && exit 2 ;;
  esac
}
for name in ${PARTS:-step correct profile_update profile_drafts}; do part "$name"; done
tail -n 2 "$OUT"/*.err >&2
[ ! -f "$OUT/headline.json" ] || cat "$OUT/headline.json"
