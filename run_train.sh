#!/usr/bin/env bash
# Train from a fresh clone: ./run_train.sh [CONFIG] [--table.key=value ...]
#
# Makes .venv beside this file where it is missing (Python 3.11 or newer is all it needs), then runs `titan train`.
# CONFIG is found from where you are, or else in the folder of this file; without one it is train_configs/debug.toml.
# Outputs are written where you are.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=setup.sh
. "$here/setup.sh"

words=()
config=$here/train_configs/debug.toml
for word in "$@"; do
    case $word in
        -*) words+=("$word") ;;
        *)
            [ "${named:-}" = '' ] || fail "one CONFIG, please: found $named and $word"
            named=$word
            config=$word
            [ -e "$word" ] || [ ! -e "$here/$word" ] || config=$here/$word
            ;;
    esac
done

set_up
exec "$here/.venv/bin/titan" train "$config" ${words[@]+"${words[@]}"}
