#!/usr/bin/env bash
# Re-create cpu.txt and dev.txt from the direct pins in cpu.in and dev.in, in a clean environment.
# Run from the repository root: requirements/lock.sh [PYTHON]
set -euo pipefail
python=${1:-python3.11}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip "$@"; }
pip install --quiet -r requirements/build.txt

# A local version label ("+cpu") names one build of a release: the lock names the release.
freeze() {
    pip freeze --exclude fbgemm-gpu --exclude setuptools | sed -E 's/^([^ @]+==[^+]+)\+[A-Za-z0-9.]+$/\1/'
}

pip install --quiet --no-build-isolation -r requirements/cpu.in
freeze > "$work/cpu"
pip install --quiet --no-build-isolation -r requirements/cpu.in -r requirements/dev.in
freeze > "$work/all"
pip check

{
    echo "# Written by requirements/lock.sh from cpu.in. The path is relative to the repository root."
    echo "./requirements/fbgemm-gpu-shim"
    cat "$work/cpu"
} > "$work/cpu.txt"
{
    echo "# Written by requirements/lock.sh from dev.in: what comes on top of cpu.txt."
    comm -13 <(sort "$work/cpu") <(sort "$work/all")
} > "$work/dev.txt"
cp "$work/cpu.txt" requirements/cpu.txt
cp "$work/dev.txt" requirements/dev.txt
