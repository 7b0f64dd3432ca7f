#!/usr/bin/env bash
# Builds, checks and measures everything on the GPU of this machine; bench/gpu_check.py --help lists the options.
# PYTHON chooses the interpreter; else the one of .venv, else python3.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
exec "$PYTHON" bench/gpu_check.py "$@"
