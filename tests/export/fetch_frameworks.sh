#!/usr/bin/env bash
# Fetches axolotl and LLaMA-Factory, without their dependencies, so that tests can load exported files with the
# frameworks' own classes. About 25 MB. The first argument is the folder, build/frameworks without one.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder="${1:-build/frameworks}"
python="${PYTHON:-.venv/bin/python}"
stamp="$folder/.fetched-1"
[ -e "$stamp" ] && exit 0
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$folder" \
    axolotl==0.19.0 llamafactory==0.9.5 \
    omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 addict==2.4.0 colorama==0.4.6
touch "$stamp"
