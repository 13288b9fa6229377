#!/usr/bin/env bash
# What a bare GPU image with jax and torch lacks, as wheels for Python 3.12 in FOLDER: about 10 MB.
#   bash benchmarks/gpu/wheels.sh FOLDER
set -euo pipefail
folder=${1:?usage: wheels.sh FOLDER}
mkdir -p "$folder"
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64
  --platform manylinux2014_x86_64 --platform any)
python3 -m pip download -q --no-deps --python-version 3.12 --only-binary=:all: "${platforms[@]}" -d "$folder" \
  array_record dill dm_tree gguf googleapis_common_protos grain immutabledict importlib_resources jsonschema \
  jsonschema_specifications ml_collections portpicker referencing rpds_py \
  tensorboardX tensorflow_datasets tensorflow_metadata termcolor toml
python3 -m pip wheel -q --no-deps -w "$folder" promise==2.3 # a source package, pure Python
