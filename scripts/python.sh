# To be sourced: which Python there is.

is_usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

asks_for_help() {
    local argument
    for argument in "$@"; do
        if [[ $argument == -h || $argument == --help ]]; then return; fi
    done
    return 1
}
