#!/usr/bin/env bash
# Installs align_jax into .venv if need be, then trains on this machine:
#   launch/local.sh CONFIG[:arg] [--workdir=DIR] [--config.key=value]...
# Without --workdir the run goes to runs/NAME of the repository, NAME made from CONFIG.
set -euo pipefail

if [[ $# -eq 0 || $1 == -* ]]; then
  sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
config=$1
shift

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [[ " $* " != *" --workdir"[=\ ]* ]]; then
  name=$(basename "$config")
  name=${name/.py/}
  set -- --workdir="$root/runs/${name//[^A-Za-z0-9._=-]/-}" "$@"
fi

# glibc hands large freed buffers back to the kernel, which zeroes them page by page at the next use.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296}
# Huge pages for the same buffers: a seventh of a training step on a CPU was page faults.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec "$python" -m align_jax train --config="$config" "$@"
