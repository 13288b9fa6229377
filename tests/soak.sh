#!/usr/bin/env bash
# A grid under faults for half an hour (tests/soak.py); PYTHON is the environment's, with the package installed.
cd "$(dirname "$0")" && PYTHONPATH="$PWD/..:$PWD" exec "${PYTHON:-python}" soak.py "$@"
