"""Imports follow the arrows: plan, launch and kernels know nothing of each other's users, and only ops joins them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import weft_attn

ROOT = Path(weft_attn.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# What a layer may import of the package. A layer is a folder, or a file in the package's root.
ALLOWED = {
    "errors": set(),
    "outputs": {"errors"},
    "plan": {"errors", "outputs", "plan"},
    "reference": {"errors", "plan"},
    "checks": {"errors"},
    "launch": {"errors", "plan", "launch"},
    "kernels": {"errors", "kernels"},
    "ops": {"errors", "plan", "reference", "launch", "kernels", "ops"},
    "api": {"errors", "checks", "plan", "ops"},
    "distributed": {"errors", "checks", "plan", "api", "ops", "distributed"},
    "integrations": {"errors", "checks", "plan", "api", "ops", "distributed", "integrations"},
}
# Nothing uses these; they may use everything.
LEAVES = {"testing", "bench", "cli", "demo"}
# Compile tooling of the kernels, which runs on no device: the matrix of what the tables ask for.
EXCEPTIONS = {"kernels/matrix.py": {"launch"}}
# Layers that must work where Triton is not installed.
WITHOUT_TRITON = {"errors", "outputs", "plan", "reference", "checks", "launch", "api", "distributed", "integrations"}


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import, those inside functions too, those for the type checker alone not."""
    found = []
    stack: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        stack += ast.iter_child_nodes(node)
    return found


def layers_used(path: Path) -> list[tuple[int, str]]:
    """(line, layer) of the package's own modules that a file imports."""
    used = []
    for line, module in imports_of(path):
        parts = module.split(".")
        if parts[0] == "weft_attn":
            used.append((line, parts[1] if len(parts) > 1 else "weft_attn"))
    return used


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_layer_imports_only_what_its_arrows_allow(path: Path) -> None:
    layer, name = layer_of(path), path.relative_to(ROOT).as_posix()
    if layer in LEAVES or name == "__init__.py":
        return
    assert layer in ALLOWED, f"{name}: a new layer needs its arrows"
    allowed = ALLOWED[layer] | EXCEPTIONS.get(name, set())
    for line, used in layers_used(path):
        assert used in allowed, f"{name}:{line}: {layer} must not import {used}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_uses_benchmarks_commands_demo_and_test_helpers(path: Path) -> None:
    if layer_of(path) in LEAVES:
        return
    used = {layer for _, layer in layers_used(path)}
    assert not used & LEAVES


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_kernels_and_ops_import_triton(path: Path) -> None:
    if layer_of(path) not in WITHOUT_TRITON:
        return
    for line, module in imports_of(path):
        assert module.split(".")[0] != "triton", f"{path.name}:{line} imports triton"


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if layer_of(p) == "kernels" and p.relative_to(ROOT).as_posix() not in EXCEPTIONS],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_kernels_hold_no_policy(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "os.environ" not in text
    assert "getenv" not in text
    assert "autograd" not in text


def test_launch_meets_kernels_in_ops_alone() -> None:
    both = set()
    for path in MODULES:
        used = {layer for _, layer in layers_used(path)}
        if layer_of(path) not in LEAVES and {"launch", "kernels"} <= used | {layer_of(path)} and "launch" in used:
            both.add(path.relative_to(ROOT).as_posix())
    assert both - set(EXCEPTIONS) <= {"ops/execute.py", "ops/recipes.py"}


def test_collectives_are_called_in_one_file() -> None:
    used = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        if layer_of(path) not in LEAVES and any(module.startswith("torch.distributed") for _, module in imports_of(path))
    }
    # A program's group starts and ends in a file of its own, and memory for collectives is allocated in another, which call nothing else.
    others = {
        "process_group": {"init_process_group", "destroy_process_group"},
        "symmetric": {"get_backend_config", "ProcessGroupNCCL"},
    }
    assert used == {"distributed/collectives.py", *(f"distributed/{name}.py" for name in others)}
    for name, calls in others.items():
        assert set(re.findall(r"\bdist\.(\w+)", (ROOT / "distributed" / f"{name}.py").read_text())) == calls


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_no_triton_and_touches_no_gpu() -> None:
    out = run_python(
        "import sys, torch, weft_attn\n"
        "print('triton' in sys.modules, torch.cuda.is_initialized(), [m for m in sys.modules if 'weft_attn.kernels' in m])"
    )
    assert out.split() == ["False", "False", "[]"]


def test_the_package_runs_on_cpu_tensors_where_triton_is_not_installed() -> None:
    out = run_python(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import torch, weft_attn as weft\n"
        "x = torch.randn(1, 5, 2, 16, requires_grad=True)\n"
        "weft.attention(x, x, x, causal=True).sum().backward()\n"
        "print(x.grad.shape, 'triton' in sys.modules)"
    )
    assert "False" in out
