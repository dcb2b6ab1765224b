"""A plan made from tensors is made again when they change, and lives no longer than they do."""

from __future__ import annotations

import gc
import weakref

import torch

from weft_attn.integrations.kept import kept, kept_with
from weft_attn.plan import Plan


def new_plan() -> Plan:
    return Plan.dense(1, 2, 2)


def test_a_plan_is_made_once_for_the_values_and_the_key() -> None:
    one, other = torch.zeros(2), torch.zeros(2)
    plan = kept_with((one, other), (1,), new_plan)
    assert kept_with((one, other), (1,), new_plan) is plan
    assert kept_with((one, other), (2,), new_plan) is not plan
    assert kept_with((one, other.clone()), (1,), new_plan) is not plan
    assert kept_with((one, one), (1,), new_plan) is not plan
    other.add_(1)
    changed = kept_with((one, other), (1,), new_plan)
    assert changed is not plan
    one.add_(1)
    assert kept_with((one, other), (1,), new_plan) is not changed


def test_a_plan_goes_with_its_tensor() -> None:
    tensor = torch.zeros(2)
    plan = weakref.ref(kept_with((tensor, tensor), (), new_plan))
    assert plan() is not None
    del tensor
    gc.collect()
    assert plan() is None


def test_host_memory_is_read_on_each_call() -> None:
    tensor = torch.zeros(2)
    assert kept((tensor,), (), new_plan) is not kept((tensor,), (), new_plan)
