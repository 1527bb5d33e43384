#!/usr/bin/env bash
# Makes .venv with the pinned dependencies and this package; does nothing when they are already there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python scripts/setup.sh" >&2
    return 1
}

fingerprint() {
    .venv/bin/python - requirements.txt pyproject.toml <<'PYTHON'
import hashlib, os, sys
digest = hashlib.sha256(f"{sys.version} {os.getcwd()}".encode())  # a moved checkout needs its editable install again
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        digest.update(file.read())
print(digest.hexdigest())
PYTHON
}

stamp=.venv/.rrm-engine-stamp
if [[ -x .venv/bin/python ]] && is_usable .venv/bin/python; then
    if [[ -f $stamp && $(<"$stamp") == "$(fingerprint)" ]]; then
        exit 0
    fi
else
    python=$(find_python)
    "$python" -m venv --clear .venv || {
        echo "setup: $python cannot make a virtual environment; install its venv module (python3-venv)" >&2
        exit 1
    }
fi
rm -f "$stamp"
echo "setup: installing into .venv (once)" >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e . >&2
fingerprint >"$stamp"
