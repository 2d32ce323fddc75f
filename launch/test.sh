#!/usr/bin/env bash
# Installs align_jax into .venv if need be, then checks format, lint, types and tests:
#   launch/test.sh [pytest arguments]
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

cd "$root"
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m basedpyright --pythonpath "$python"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Compiling takes most of the time, and a core: two files at a time, each whole in one process.
exec "$python" -m pytest -n 2 --dist loadfile "$@"
