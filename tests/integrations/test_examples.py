"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["masks", "flash_attn", "transformers"])
def test_the_examples_of_a_module_hold(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"weft_attn.integrations.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
