"""tools/compare_trees.py runs each tree's own code, in turns, and says where their results differ."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL, SOURCE = ROOT / "tools" / "compare_trees.py", ROOT / "src"
PACE = ("--rounds", "2", "--round-ms", "1", "--warm-up-ms", "1")
QUICK = ("--device", "cpu", "--quick", *PACE, "--suites", "square", "--only", "causal 4 x")


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with another softmax scale."""
    folder = tmp_path_factory.mktemp("other") / "src"
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    checks = folder / "weft_attn" / "checks.py"
    changed = checks.read_text().replace("return head_dim**-0.5 if", "return 1.1 * head_dim**-0.5 if")
    assert changed != checks.read_text()
    checks.write_text(changed)
    return folder


def test_a_tree_that_computes_something_else_is_found(other: Path) -> None:
    found = compare(f"base={SOURCE}", f"same={SOURCE}", f"other={other}", *QUICK)
    rows = re.findall(r"(forward|backward) +(\w+) .*x([\d.]+) .* differs by (\S+)", found.stdout)
    assert [row[:2] for row in rows] == [(p, tree) for p in ("forward", "backward") for tree in ("base", "same", "other")]
    assert all(float(ratio) > 0 for _, _, ratio, _ in rows)
    differences = {(pass_name, tree): float(apart) for pass_name, tree, _, apart in rows}
    for pass_name in ("forward", "backward"):
        assert differences[pass_name, "same"] == 0
        assert differences[pass_name, "other"] > 0.01
    assert found.returncode == 1
    assert "2 of 6 results differ" in found.stderr


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    assert "NAME=SRC" in compare(f"base={tmp_path}", *QUICK).stderr
    assert "a pass is forward or backward" in compare(f"base={SOURCE}", *QUICK, "--passes", "sideways").stderr
    assert "rounds are counted" in compare(f"base={SOURCE}", *QUICK, "--rounds", "0").stderr
    assert "no case has this name" in compare(f"base={SOURCE}", *QUICK, "--only", "nothing").stderr
    (tmp_path / "weft_attn").mkdir()
    (tmp_path / "weft_attn" / "__init__.py").write_text("raise ImportError('planted')")
    found = compare(f"base={tmp_path}", *QUICK)
    assert found.returncode == 1
    assert "planted" in found.stderr
    assert "base: its process has ended" in found.stderr
