#!/usr/bin/env bash
# One short loan of a GPU, in order of worth: correct, EC's step, a job, the kernels. Every line is a process with a
# limit of its own, and its result is written at once. From the repository's root:
#   OUT=FOLDER [WHEELS=FOLDER] bash benchmarks/gpu/run.sh          about 6 minutes on an H100
#   OUT=FOLDER SMALL=1 bash benchmarks/gpu/run.sh                  the same lines at a CPU's size
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
  preset=paper batch=16 small= XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}
  export XLA_PYTHON_CLIENT_MEM_FRACTION JAX_PLATFORMS=cuda,cpu
fi
export TF_CPP_MIN_LOG_LEVEL=1 PYTHONUNBUFFERED=1

line() { # NAME SECONDS COMMAND…
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.out" 2>"$OUT/$name.err"
  echo "{\"line\": \"$name\", \"exit\": $?, \"seconds\": $((SECONDS - began))}" | tee -a "$OUT/lines.jsonl"
}

step=(python3 -m benchmarks.opd_step "--preset=$preset" "--microbatch=$batch" --remat=dots --steps=3 --json)
line step 150 "${step[@]}"
python3 -m benchmarks.gpu.record "$OUT/step.out" "${step[@]/python3/python}" >"$OUT/headline.json"
line correct 120 python3 -m benchmarks.gpu.correct $small
line job 120 python3 -m listopd_jax.main --config=configs/fashion.py:tiny "--workdir=$(mktemp -d)/job" \
  --config.sft.teacher.steps=20 --config.sft.student.steps=20 --config.opd.steps=3 --config.opd.lambdas=1.2 \
  --config.forecast.lambdas=1.2 --config.evaluation.max_lists=32 --config.data.synthetic.products=200
line profile_decode 80 python3 -m benchmarks.gpu.profile decode "--preset=$preset"
line profile_update 100 python3 -m benchmarks.gpu.profile update "--preset=$preset" "--microbatch=$batch" --remat=dots
tail -n 2 "$OUT"/*.err >&2
cat "$OUT/headline.json"
