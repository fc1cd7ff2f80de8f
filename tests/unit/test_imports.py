"""Who may import whom: the rules of docs/architecture.md, read from the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for folder in ("titan", "models", "kernels") for p in (ROOT / folder).rglob("*.py"))
TORCHLESS = [
    f"titan/{name}.py"
    for name in (
        *("config", "toml", "check", "check_plan", "check_precision", "precision/float8_layers", "schema", "reference", "zoo"),
        *("sharding", "cli", "arguments", "terminal"),
        *("status", "parallel/schedules", "parallel/schedule_file", "parallel/timeline"),
        *("checkpoint/about", "checkpoint/commit", "metrics/history", "metrics/plot", "metrics/plot_svg", "metrics/plot_text"),
        *(f"drawing/{path.stem}" for path in (ROOT / "titan" / "drawing").glob("*.py")),
        *(f"commands/{path.stem}" for path in (ROOT / "titan" / "commands").glob("*.py")),
    )
]
DIMENSIONS = (
    ("pipeline", "schedules", "schedule_file", "stages", "timeline"),
    ("tensor", "tensor_async", "tensor_exchange", "tensor_loss"),
)
"""Files that are one dimension together."""
NEUTRAL = ("mesh", "collectives", "weight_gradients")
"""Files that several dimensions may use."""
TYPES_ONLY = {"titan.parallel.apply", "titan.parallel.apply.Plan"}


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Dotted names that a file imports, relative ones resolved; everywhere=False leaves out functions and TYPE_CHECKING."""
    found: set[str] = set()
    package = ("titan." if path.parts[len(ROOT.parts)] != "titan" else "") + ".".join(path.relative_to(ROOT).parent.parts)

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *([base] if base else [])])
            found.update({base, *(f"{base}.{alias.name}" for alias in node.names)})
        inside = isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        if everywhere or not inside:
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(path.read_text()))
    return found


def reach(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(package + ".")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_rules(path: Path) -> None:
    name, found = str(path.relative_to(ROOT)), imports(path)
    assert not reach(found, "models") | reach(found, "kernels"), "import titan.models and titan.kernels"
    assert not reach(found, "titan.train") or name == "titan/train.py", "nothing imports train.py"
    if name.startswith("kernels/"):
        assert not reach(found, "titan") - reach(found, "titan.kernels")
        assert not reach(found, "torch.distributed")
    if name.startswith("models/"):
        own = "titan." + ".".join(path.relative_to(ROOT).parent.parts)
        allowed = reach(found, own) | reach(found, "titan.sharding") | {"titan.models"}
        assert not reach(found, "titan") - allowed, "a model knows only itself and titan.sharding"
        assert not reach(found, "torch.distributed"), "a model knows no ranks"
        if path.name != "model.py":
            assert not reach(found, "torch"), "only model.py needs torch"
    if name.startswith("titan/parallel/") and path.name != "apply.py":
        known = {"titan.parallel"}
        for files in (NEUTRAL, *DIMENSIONS):
            if path.stem in files or files == NEUTRAL:
                known |= {imported for file in files for imported in reach(found, f"titan.parallel.{file}")}
        assert not reach(found, "titan.parallel") - known - TYPES_ONLY, "dimensions do not know one another"
        assert not reach(found, "titan.models") | reach(found, "titan.zoo"), "dimensions do not know models"
    if name in TORCHLESS:
        assert not reach(imports(path, everywhere=False), "torch")


def test_config_answers_without_torch() -> None:
    code = (
        "import sys; from titan.cli import main; main(['config', 'train_configs/debug.toml']);"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_the_readme_says_how_much_of_ours_a_rank_imports() -> None:
    code = """if True:
        import sys, titan.train, titan.models.llama3.model, titan.models.llama3.sharding
        for module in list(sys.modules.values()):
            if module.__name__.split(".")[0] == "titan" and getattr(module, "__file__", None): print(module.__file__)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    files = set(done.stdout.split())
    said = re.search(r"imports (\d+) files of ours .* at most ([\d,]+) lines", (ROOT / "README.md").read_text())
    assert said
    lines = sum(len(Path(file).read_text().splitlines()) for file in files)
    assert len(files) == int(said[1])
    assert int(said[2].replace(",", "")) - 200 < lines <= int(said[2].replace(",", "")), lines


def test_the_model_runs_alone_in_ten_lines() -> None:
    script = """
        import torch
        from titan.models.llama3.config import Config
        from titan.models.llama3.model import Transformer
        torch.manual_seed(0)
        model = Transformer(Config(n_layers=2))
        model.init_weights()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        tokens = torch.arange(65).repeat(4, 1) % 7
        for _ in range(30):
            loss = model(tokens[:, :-1], labels=tokens[:, 1:]) / 256
            loss.backward(); optimizer.step(); optimizer.zero_grad()
        import sys; assert loss < 0.5, loss; assert not any(m.startswith('titan.') and 'models' not in m for m in sys.modules)
    """
    code = "\n".join(line[8:] for line in script.splitlines())
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_models_and_kernels_are_links_without_a_package_of_their_own() -> None:
    for folder in ("models", "kernels"):
        assert (ROOT / "titan" / folder).is_symlink()
        assert not (ROOT / folder / "__init__.py").exists()
