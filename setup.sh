# Sourced by run_train.sh and tests/run.sh, which set `here` (this folder): `set_up [EXTRA]` makes $here/.venv.
#
# A second start must cost nothing: a stamp in .venv names what it was made from (pyproject.toml, constraints.txt,
# $PYTHON, the extra), and where it matches nothing else is looked at. A set-up that was interrupted left no stamp and is
# gone over again. A torch that the Python brings along is used as it is (a cluster's own build, say).
# shellcheck shell=bash disable=SC2154

say() { printf 'titan: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

# The Python to make .venv from: $PYTHON, or the newest that constraints.txt is known to hold for.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or newer; unset it, or name one that is"
        command -v "$PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3; do
        if is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.11 $0"
}

is_new_enough() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Version of the torch that a Python brings along, if titan can work with it (2.11 or newer); else nothing.
torch_of() {
    "$1" - 2>/dev/null <<'PY' || true
import torch

if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11):
    print(torch.__version__)
PY
}

has_gpu() { compgen -G '/dev/nvidia[0-9]*' >/dev/null; }

pinned() { sed -n "s/^$1==//p" "$here/constraints.txt"; }

# The pinned torch. Without a GPU a CPU build, where an index has one: a tenth of the download.
install_torch() {
    local version cpu_index=https://download.pytorch.org/whl/cpu
    version=$(pinned torch)
    if has_gpu; then
        "$venv/bin/python" -m pip uninstall --quiet --yes torch 2>/dev/null # a CPU build, from a login node
    elif [ "$(uname -s)" = Linux ]; then
        "$venv/bin/python" -m pip install --quiet "torch==$version+cpu" 2>/dev/null && return
        "$venv/bin/python" -m pip install --quiet --retries 1 --timeout 10 --extra-index-url "$cpu_index" \
            "torch==$version+cpu" 2>/dev/null && return
    fi
    "$venv/bin/python" -m pip install "torch==$version"
}

# Whether .venv holds the pinned torch, in a build that can use the GPU if there is one.
has_torch() {
    local found
    found=$(torch_of "$venv/bin/python")
    [ "${found%%+*}" = "$(pinned torch)" ] && ! { has_gpu && [ "${found#*+}" = cpu ]; }
}

# Make or complete .venv, under the lock.
make_venv() {
    local extra=$1 python=$2 own_torch made_by site=() constraints=$venv/constraints.txt
    own_torch=$(torch_of "$python")
    made_by="$python $("$python" -V) $own_torch"
    [ -z "$own_torch" ] || site=(--system-site-packages)
    rm -f "$venv/titan-stamp"
    say "setting up $venv with $("$python" --version) (once, some minutes)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module; on Debian or Ubuntu: apt install python3-venv (or ask for PYTHON=another)"
    # An environment of another Python, or one without a working pip, is made anew.
    if [ "$(cat "$venv/titan-python" 2>/dev/null)" != "$made_by" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$venv"
        "$python" -m venv ${site[@]+"${site[@]}"} "$venv" || fail "$python -m venv $venv failed"
        printf '%s\n' "$made_by" >"$venv/titan-python"
    fi
    if [ -n "$own_torch" ]; then
        # Its own companions stay too: a pin would pull another numpy or triton under it.
        say "using torch $own_torch of $python"
        if [ -z "$(torch_of "$venv/bin/python")" ]; then # it is an environment itself: the new one stands on its shoulders
            "$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' >"$venv/outer"
            mv "$venv/outer" "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
        fi
        "$venv/bin/python" - "$here/constraints.txt" >"$constraints" <<'PY'
import sys
from importlib.metadata import distributions

present = {(dist.metadata["Name"] or "").lower().replace("_", "-") for dist in distributions()}
for line in open(sys.argv[1]):
    if line.split("==")[0].strip().lower().replace("_", "-") not in present | {"torch"}:
        print(line, end="")
PY
    else
        cp "$here/constraints.txt" "$constraints"
        has_torch || install_torch ||
            fail "torch could not be installed (see above); is there a network, or a mirror in pip's configuration?"
    fi
    "$venv/bin/python" -m pip install --quiet -c "$constraints" -e "$here${extra:+[$extra]}" ||
        fail "the packages could not be installed (see above); is there a network, or a mirror in pip's configuration?"
}

set_up() {
    local extra=${1:-} stamp
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    venv=$here/.venv
    stamp="$(cat "$here/pyproject.toml" "$here/constraints.txt" | cksum) ${PYTHON:-} $here"
    is_ready "$stamp" "$extra" && return
    (
        if command -v flock >/dev/null 2>&1; then
            exec 9>"$here/.venv.lock"
            flock -n 9 || {
                say "waiting for another set-up of $venv"
                flock 9
            }
        fi
        is_ready "$stamp" "$extra" && exit 0
        python=$(find_python)
        make_venv "$extra" "$python"
        printf '%s\n%s\n%s\n' "$stamp" "$extra" "$(has_gpu && echo gpu || echo cpu)" >"$venv/titan-stamp.new"
        mv "$venv/titan-stamp.new" "$venv/titan-stamp"
    )
}

# Whether .venv was made from what is here now, with the extra that is asked for, and not without a GPU where one is now.
is_ready() {
    local made_from='' made_with='' made_on=''
    [ -f "$venv/titan-stamp" ] && [ -x "$venv/bin/python" ] || return 1
    { read -r made_from && read -r made_with && read -r made_on; } <"$venv/titan-stamp" || return 1
    [ "$made_from" = "$1" ] && { [ -z "$2" ] || [ "$made_with" = "$2" ]; } && { [ "$made_on" = gpu ] || ! has_gpu; }
}
