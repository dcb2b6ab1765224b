"""Errors of the library, and the one way to raise them.

Every error about what a caller passed is a `ValueError` and says three things: the rule, what was expected, what came.
"""

from __future__ import annotations

from typing import Any, NoReturn


class WeftError(ValueError):
    """Base of every error raised for what a caller passed."""


class InvalidPlan(WeftError):
    """A slice or a plan breaks an invariant."""


class InvalidInput(WeftError):
    """A tensor, a scalar or a sequence-length array breaks a rule of the call."""


class Unsupported(WeftError):
    """A valid request that this machine, kernel or installation cannot serve exactly."""


def require(
    holds: bool,
    rule: str,
    *,
    expected: Any,
    given: Any,
    error: type[WeftError] = InvalidInput,
) -> None:
    """Raise `error` unless `holds`; the message names the rule, the expected and the given."""
    if not holds:
        refuse(rule, expected=expected, given=given, error=error)


def refuse(rule: str, *, expected: Any, given: Any, error: type[WeftError] = InvalidInput) -> NoReturn:
    """Raise `error`: the end of a check that every call makes, which words what it says when it says it."""
    raise error(f"{rule}: expected {expected}, given {given}")
