#!/usr/bin/env bash
# Python with everything a run needs: scripts/run.sh -m rrm_engine.trace RUN_DIR
# --help is answered first, by any Python; it installs nothing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/python.sh"
python=$root/.venv/bin/python
if asks_for_help "$@"; then
    is_usable "$python" || python=$(find_python)
    PYTHONPATH=$root:$root/kernels "$python" "$@"
    if [[ ! -f $root/.venv/.rrm-engine-requirements ]]; then
        echo $'\nNothing is installed yet: the first run without --help does that, into .venv (torch and some 60 packages).'
    fi
    exit
fi
"$root/scripts/setup.sh"
exec "$python" "$@"
