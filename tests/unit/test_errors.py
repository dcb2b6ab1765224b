"""Every error says the rule, what was expected and what came."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import weft_attn
from weft_attn import InvalidInput, InvalidPlan, Unsupported, WeftError
from weft_attn.errors import require
from weft_attn.launch import InvalidConfig

SOURCE = Path(weft_attn.__file__).parent
OURS = ("WeftError", "InvalidPlan", "InvalidInput", "Unsupported", "InvalidConfig")


@pytest.mark.parametrize("error", [InvalidPlan, InvalidInput, Unsupported, InvalidConfig])
def test_our_errors_are_value_errors(error: type[Exception]) -> None:
    assert issubclass(error, WeftError)
    assert issubclass(error, ValueError)


def test_require_says_rule_expected_and_given() -> None:
    require(True, "fine", expected=1, given=2)
    with pytest.raises(InvalidInput, match=r"^q has heads: expected 4, given 3$"):
        require(False, "q has heads", expected=4, given=3)
    with pytest.raises(InvalidPlan, match=r"^a: expected b, given c$"):
        require(False, "a", expected="b", given="c", error=InvalidPlan)


def raised_in(path: Path) -> list[tuple[int, str]]:
    """(line, literal text) of each of our errors that a file raises itself."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in OURS:
            found.append((node.lineno, ast.unparse(call)))
    return found


# What a library user meets; commands and benchmarks speak to a terminal.
LIBRARY = [p for p in sorted(SOURCE.rglob("*.py")) if p.relative_to(SOURCE).parts[0] not in ("bench", "cli", "demo", "testing")]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_raise_says_what_was_expected_and_what_came(path: Path) -> None:
    for line, text in raised_in(path):
        # launch/select.py puts in `shortfall`, whose text begins with "expected".
        assert "expected" in text or "{lacking}" in text, f"{path}:{line}: {text}"
        assert "given" in text, f"{path}:{line}: {text}"
