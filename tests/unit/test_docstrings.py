"""The examples in the docstrings say what is so."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["api", "plan.slices"])
def test_the_examples_of_a_docstring_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"weft_attn.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
