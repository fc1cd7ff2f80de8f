#!/usr/bin/env bash
# The whole check: ./tests/run.sh runs ruff, mypy and pytest; with arguments, `pytest ARGUMENTS` alone.
# Sets up .venv with the test tools first where they are missing.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=../setup.sh
. "$here/setup.sh"
set_up test

if [ $# -gt 0 ]; then
    exec "$here/.venv/bin/python" -m pytest "$@"
fi
cd "$here"
.venv/bin/ruff check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -q tests
