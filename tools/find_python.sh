#!/bin/sh
# Prints a Python that works and is new enough (3.11 to 3.13), or says what is missing and fails.
# A name on PATH proves nothing: version managers leave stubs that only print an error, so each
# candidate is run.
works() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    if works "$PYTHON"; then
        echo "$PYTHON"
        exit 0
    fi
    echo "flashmla: PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13 that runs" >&2
    exit 1
fi
for name in python3 python python3.13 python3.12 python3.11; do
    if works "$name"; then
        command -v "$name"
        exit 0
    fi
done
echo "flashmla: no Python 3.11, 3.12 or 3.13 was found on PATH (tried python3, python," \
     "python3.13, python3.12, python3.11)." >&2
echo "          Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
