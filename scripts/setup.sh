#!/usr/bin/env bash
# Makes .venv with pinned packages and this one; does nothing when they are already there.
#   scripts/setup.sh         what runs need: requirements.txt
#   scripts/setup.sh test    that, and what tests and checks need: requirements-test.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/python.sh
case "${1:-run}" in
    run) lists=(requirements.txt) ;;
    test) lists=(requirements-test.txt requirements.txt) ;;
    -h | --help)
        sed -n '2,4s/^# //p' scripts/setup.sh
        exit
        ;;
    *)
        echo "setup: it takes test, or nothing: scripts/setup.sh test, not $*" >&2
        exit 2
        ;;
esac

fingerprint() {
    .venv/bin/python - pyproject.toml "$@" <<'PYTHON'
import hashlib, os, sys
digest = hashlib.sha256(f"{sys.version} {os.getcwd()}".encode())  # a moved checkout needs its editable install again
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        digest.update(file.read())
print(digest.hexdigest())
PYTHON
}

# By list of packages the file that says it was installed.
stamp() { echo ".venv/.rrm-engine-${1%.txt}"; }

if [[ -x .venv/bin/python ]] && is_usable .venv/bin/python; then
    if [[ -f $(stamp "${lists[0]}") && $(<"$(stamp "${lists[0]}")") == "$(fingerprint "${lists[@]}")" ]]; then
        exit 0
    fi
else
    python=$(find_python)
    "$python" -m venv --clear .venv || {
        echo "setup: $python cannot make a virtual environment; install its venv module (python3-venv)" >&2
        exit 1
    }
fi
rm -f .venv/.rrm-engine-*
echo "setup: installing ${lists[0]} into .venv (once)" >&2
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile)
"${pip[@]}" -r "${lists[0]}" >&2
"${pip[@]}" --no-deps -e . >&2
fingerprint "${lists[@]}" >"$(stamp "${lists[0]}")"
fingerprint requirements.txt >"$(stamp requirements.txt)"
