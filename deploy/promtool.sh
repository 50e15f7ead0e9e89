#!/usr/bin/env bash
# Put `promtool`, which tests the alerting rules, into a virtual environment.
#
#   deploy/promtool.sh [VENV]
#
# VENV is relative to where you are; without it, .venv beside pyproject.toml.
#
# It is taken out of Debian's package of Prometheus; nothing is installed on the system. Where that
# cannot be had, one line says so, and the tests that need it are skipped: this never fails.
set -euo pipefail

venv=${1:-$(dirname "$0")/../.venv}
target=$venv/bin/promtool
if [ -x "$target" ] || command -v promtool >/dev/null; then
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
log=$folder/log

download() { (cd "$folder" && timeout 120 apt-get download prometheus); }

# A fresh machine has no package lists yet; only root may fetch them.
update() { [ "$(id -u)" = 0 ] && timeout 120 apt-get update; }

extract() {
  dpkg-deb --fsys-tarfile "$folder"/prometheus_*.deb | tar -xf - -C "$folder" ./usr/bin/promtool &&
    "$folder/usr/bin/promtool" --version &&
    install -m 755 "$folder/usr/bin/promtool" "$target"
}

if { download || { update && download; }; } >"$log" 2>&1 && extract >>"$log" 2>&1; then
  printf '\033[1m[setup]\033[0m promtool, for the tests of the alerting rules: %s\n' "$target"
else
  printf 'setup: no promtool (%s): the alerting rules are not tested; install Prometheus (Debian: apt-get install prometheus)\n' \
    "$(tail -n 1 "$log")"
fi
