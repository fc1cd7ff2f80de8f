"""What runs before Python does: shell files, the SLURM template and the Dockerfile, linted and held against the tree."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tomli

ROOT = Path(__file__).parents[2]
SHELL = ["setup.sh", "run_train.sh", "tests/run.sh", ".ci/run", "slurm/train.sbatch"]
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a linter that the test extra has put beside this Python."""
    command = [str(Path(sys.executable).with_name(name)), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def excluded(path: str) -> bool:
    """Whether .dockerignore leaves a path out of the build: the last pattern that matches it, or a folder above it, decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if pattern and not line.startswith("#"):
            above = [str(p) for p in (Path(path), *Path(path).parents)][:-1]
            if any(fnmatch(p, pattern) or fnmatch("/" + p, pattern) for p in above):
                out = not line.startswith("!")
    return out


def test_every_shell_file_is_linted() -> None:
    first = {path: path.read_bytes()[:20] for path in ROOT.iterdir() if path.is_file()}
    assert {p.name for p, head in first.items() if head.startswith(b"#!") and b"sh" in head.split(b"\n")[0]} <= set(SHELL)
    assert {str(p.relative_to(ROOT)) for folder in ("tests", "slurm") for p in (ROOT / folder).rglob("*.s[hb]*")} <= set(SHELL)


@pytest.mark.parametrize("path", SHELL)
def test_shellcheck(path: str) -> None:
    done = tool("shellcheck", "-x", "-P", "SCRIPTDIR", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint() -> None:
    done = tool("hadolint", "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_gets_what_it_copies() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert {"constraints.txt", "pyproject.toml", "titan", "models", "kernels", "train_configs"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert not excluded(source)
    package = [p for folder in ("titan", "models", "kernels") for p in (ROOT / folder).rglob("*.py")]
    assert not [p for p in package if excluded(str(p.relative_to(ROOT)))]
    for path in (".git/config", ".venv/bin/python", "outputs/debug/config.toml", "titan/__pycache__/cli.cpython-311.pyc"):
        assert excluded(path), f"{path} would be sent to the build"
    wanted = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {wanted["readme"], *wanted["license-files"]} <= set(sources), "pip refuses to build without them"


def test_the_image_has_the_pinned_versions() -> None:
    """No version of a package stands in the Dockerfile: each install takes constraints.txt, and torch's line out of it."""
    installs = re.findall(r"pip install [^&;\n]+", DOCKERFILE)
    assert len(installs) == 4
    assert all("-c constraints.txt" in install for install in installs)
    assert not re.search(r"==\d", DOCKERFILE)
    assert len(re.findall("^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)) == 1
    python = re.search(r"^ARG PYTHON=3\.(\d+)$", DOCKERFILE, re.MULTILINE)
    assert python
    assert re.search(rf"python3\.{python[1]}\b", (ROOT / "setup.sh").read_text()), "constraints.txt holds for another Python"


def test_the_template_has_no_clusters_names() -> None:
    options = re.findall(r"^#SBATCH --([a-z-]+)", (ROOT / "slurm" / "train.sbatch").read_text(), re.MULTILINE)
    assert options
    assert not {"partition", "account", "qos", "constraint", "nodelist", "time", "nodes"} & set(options)
