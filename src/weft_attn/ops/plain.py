"""The rule that says when PyTorch's dispatcher may be left out of a call: when all it would do is to ask whether a gradient is wanted.

Half of the host's time of a short call would be the dispatcher's way through Python. Whoever watches or transforms operators
(torch.compile, export, fake tensors, torch.func, modes, tensor subclasses, profilers that autograd knows of) still gets one.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from weft_attn.errors import Unsupported

_keys_of = torch._C._dispatch_keys
_keys_of_thread = torch._C._dispatch_tls_local_include_set

# Keys of a strided tensor on a CPU or a GPU, with or without a gradient, and of a thread in which nothing special goes on. Autocast
# has no rule for attention, and lets it pass.
_PLAIN = 0
for _name in "CPU", "CUDA", "BackendSelect", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA":
    _PLAIN |= torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[_name]).raw_repr()
_SPECIAL = ~_PLAIN


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether a call with these tensors is nobody's business but autograd's and their device's."""
    if torch.compiler.is_compiling():
        return False
    if has_torch_function_variadic(*tensors) or forward_ad._current_level >= 0 or torch._C._autograd._profiler_enabled():
        return False
    keys = _keys_of_thread().raw_repr()
    for x in tensors:
        if x is not None:
            keys |= _keys_of(x).raw_repr()
    return not keys & _SPECIAL


def refuse_tangents(*tensors: torch.Tensor | None) -> None:
    """Raise `Unsupported` for tensors with a forward-mode tangent, which PyTorch would drop without a word."""
    if forward_ad._current_level >= 0 and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise Unsupported("attention has reverse-mode derivatives: expected tensors without tangents, given forward-mode ones")


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to take note of a call with these plain tensors."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                # Inside another operator's kernel, below autograd, nothing is noted.
                return not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)
    return False
