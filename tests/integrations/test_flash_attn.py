"""flash-attn's functions: its signatures, every argument honoured or refused, values and gradients against float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from weft_attn.errors import Unsupported, WeftError
from weft_attn.integrations import flash_attn
from weft_attn.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from weft_attn.testing.compare import assert_close_to_oracle

SIGNATURES = {
    "flash_attn_func": "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, "
    "block_table=None",
    "flash_attn_qkvpacked_func": "qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False",
    "flash_attn_kvpacked_func": "q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
    "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), "
    "softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_flash_attns(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    written = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert ", ".join(written) == SIGNATURES[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence (S, H, D) by definition, in the inputs' dtype: out and lse (H, Sq)."""
    rows, keys, group = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    distance = torch.arange(keys)[None, :] - (torch.arange(rows)[:, None] + keys - rows)
    left, right = window_size
    right = 0 if causal else right
    seen = torch.ones(rows, keys, dtype=torch.bool)
    seen = seen & (distance >= -left) if left >= 0 else seen
    seen = seen & (distance <= right) if right >= 0 else seen
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.where(seen, torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]), 0.0)
    return torch.einsum("hqk,khd->qhd", probs, v), lse


OPTIONS: list[dict[str, Any]] = [
    {},
    dict(causal=True),
    dict(window_size=(2, 1)),
    dict(window_size=(3, -1)),
    dict(window_size=(-1, 2)),
    dict(causal=True, window_size=(3, 5), softcap=1.5, softmax_scale=0.4),
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape) + shape[0]))


def compare(call: Callable[..., Any], oracle: Callable[..., Any], tensors: dict[str, torch.Tensor]) -> None:
    """Outputs and the gradient of every tensor, `call` in float32 against `oracle` in float64 and in float32."""
    results = []
    for function, dtype in ((call, torch.float32), (oracle, torch.float64), (oracle, torch.float32)):
        leaves = {name: x.detach().to(dtype).clone().requires_grad_() for name, x in tensors.items()}
        out, lse = function(**leaves)[:2]
        finite = lse.isfinite()
        loss = (out * normal(*out.shape, seed=1).to(dtype)).sum() + (lse.masked_fill(~finite, 0) * 0.3).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results.append({"out": out, "lse": lse[..., None], **dict(zip(leaves, grads, strict=True))})
    for name in results[0]:
        smallest = 1.0 if name == "lse" else 0.0
        assert_close_to_oracle(name, *(result[name] for result in results), dtype=torch.float32, smallest=smallest)


@pytest.mark.parametrize("sizes", [(5, 5), (3, 7), (7, 3)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_of_equal_lengths(options: dict[str, Any], sizes: tuple[int, int]) -> None:
    def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        each = [exact(*x, **options) for x in zip(q, k, v, strict=True)]
        return torch.stack([out for out, _ in each]), torch.stack([lse for _, lse in each])

    tensors = dict(q=normal(2, sizes[0], 4, 16), k=normal(2, sizes[1], 2, 16), v=normal(2, sizes[1], 2, 8, seed=3))
    compare(lambda **x: flash_attn_func(**x, **options, return_attn_probs=True), oracle, tensors)


CU_Q, CU_K = [0, 4, 4, 7, 9], [0, 6, 8, 10, 10]


@pytest.mark.parametrize("paged", [False, True], ids=["packed", "paged"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_documents(options: dict[str, Any], paged: bool) -> None:
    pages = torch.tensor([[3, 1], [0, 9], [2, 9], [9, 9]], dtype=torch.int32)

    def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        each = []
        for d in range(4):
            if paged:
                place = [int(pages[d, i // 4]) * 4 + i % 4 for i in range(CU_K[d + 1] - CU_K[d])]
                keys, values = (x.reshape(-1, *x.shape[2:])[place] for x in (k, v))
            else:
                keys, values = k[CU_K[d] : CU_K[d + 1]], v[CU_K[d] : CU_K[d + 1]]
            each.append(exact(q[CU_Q[d] : CU_Q[d + 1]], keys, values, **options))
        return torch.cat([out for out, _ in each]), torch.cat([lse for _, lse in each], dim=1)

    shape = (4, 4) if paged else (10,)
    tensors = dict(q=normal(9, 4, 16), k=normal(*shape, 2, 16), v=normal(*shape, 2, 8, seed=3))
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32) for cu in (CU_Q, CU_K))
    table = dict(block_table=pages) if paged else {}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 6, **options, **table, return_attn_probs=True)

    compare(call, oracle, tensors)


def test_packed_tensors_are_the_same_attention() -> None:
    qkv = normal(2, 5, 3, 4, 16)
    q, k, v = qkv.unbind(2)
    expected = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, causal=True), expected)
    assert torch.equal(flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True), expected)
    for wrong in (qkv[:, :, :2], qkv[0]):
        with pytest.raises(WeftError):
            flash_attn_qkvpacked_func(wrong)


@pytest.mark.parametrize("place", ["rows", "given rows", "pages"])
@pytest.mark.parametrize("lengths", ["int", "tensor", "left-padded"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_over_a_cache_after_new_keys_were_written(options: dict[str, Any], lengths: str, place: str) -> None:
    batch, rows, new, room = 3, 2, 2, 12
    held = torch.tensor([4, 4, 4] if lengths == "int" else [0, 7, 10] if lengths == "tensor" else [3, 7, 10])
    leftpad = torch.tensor([2, 0, 7]) if lengths == "left-padded" else torch.zeros(3, dtype=torch.int64)
    index = torch.tensor([4, 0, 2])
    pages = torch.tensor([[5, 2, 8], [0, 1, 3], [4, 6, 7]], dtype=torch.int32)
    shape = (9, 4) if place == "pages" else (5 if place == "given rows" else batch, room)
    q, k, v = normal(batch, rows, 4, 16), normal(batch, new, 2, 16), normal(batch, new, 2, 8, seed=3)
    caches = normal(*shape, 2, 16), normal(*shape, 2, 8, seed=3)
    # What the caches must hold, and what each sequence sees of them.
    after = [x.clone() for x in caches]
    expected = []
    for b in range(batch):
        views = []
        for cache, x in zip(after, (k, v), strict=True):
            if place == "pages":
                where = [(int(pages[b, i // 4]), i % 4) for i in range(room)]
            else:
                where = [(int(index[b]) if place == "given rows" else b, i) for i in range(room)]
            for i in range(new):
                cache[where[int(held[b]) + i]] = x[b, i]
            views.append(torch.stack([cache[at] for at in where[int(leftpad[b]) : int(held[b]) + new]]))
        expected.append(exact(q[b].double(), *(x.double() for x in views), **options))
    arguments: dict[str, Any] = dict(cache_seqlens=4 if lengths == "int" else held.int(), return_softmax_lse=True, **options)
    if lengths == "left-padded":
        arguments["cache_leftpad"] = leftpad.int()
    if place == "given rows":
        arguments["cache_batch_idx"] = index.int()
    if place == "pages":
        arguments["block_table"] = pages
    out, lse = flash_attn_with_kvcache(q, *caches, k, v, **arguments)
    for cache, kept in zip(caches, after, strict=True):
        assert torch.equal(cache, kept)
    torch.testing.assert_close(out.double(), torch.stack([x for x, _ in expected]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), torch.stack([x for _, x in expected]), rtol=1e-5, atol=1e-5)
    # Read again, nothing written: the same.
    arguments["cache_seqlens"] = (held + new).int()
    assert torch.equal(flash_attn_with_kvcache(q, *caches, **arguments)[0], out)


def test_a_cache_of_some_of_its_tokens_is_written_in_place_too() -> None:
    whole = torch.zeros(2, 8, 2, 16), torch.zeros(2, 8, 2, 16)
    k = normal(2, 1, 2, 16)
    out = flash_attn_with_kvcache(normal(2, 1, 4, 16), *(x[:, :5] for x in whole), k, k, cache_seqlens=0)
    assert torch.equal(whole[0][:, 0], k[:, 0])
    torch.testing.assert_close(out, k.repeat_interleave(2, dim=2))


def test_a_cache_without_lengths_is_full() -> None:
    q, cache = normal(2, 1, 4, 16), normal(2, 8, 2, 16)
    torch.testing.assert_close(flash_attn_with_kvcache(q, cache, cache), flash_attn_func(q, cache, cache))


# ---- every parameter: honoured or refused ---------------------------------------------------------------------------------

# A value that is not the default, and whether the result must change; the tests above say how.
HONOURED: dict[str, tuple[Any, bool]] = {
    "softmax_scale": (0.3, True),
    "causal": (True, True),
    "window_size": ((1, 1), True),
    "softcap": (0.5, True),
    "deterministic": (True, False),
    "return_attn_probs": (True, False),
    "return_softmax_lse": (True, False),
    "block_table": (torch.tensor([[1], [0]]), True),
    "cache_seqlens": (3, True),
    "cache_batch_idx": (torch.tensor([1, 0]), True),
    "cache_leftpad": (torch.tensor([1, 2]), True),
}
REFUSED: dict[str, Any] = {
    "dropout_p": 0.1,
    "alibi_slopes": torch.zeros(4),
    "rotary_cos": torch.zeros(8, 8),
    "rotary_sin": torch.zeros(8, 8),
    "rotary_interleaved": False,
    "num_splits": 1,
}
TENSORS = {"q", "k", "v", "qkv", "kv", "k_cache", "v_cache", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}


def plain_call(name: str, **options: Any) -> torch.Tensor:
    q, k, v = normal(2, 5, 4, 16), normal(2, 5, 4, 16, seed=2), normal(2, 5, 4, 16, seed=3)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v}
    if name == "flash_attn_varlen_func":
        cu = torch.tensor([0, 5, 10])
        if "block_table" not in options:
            arguments = {name: x.flatten(0, 1) for name, x in arguments.items()}
        arguments |= dict(q=q.flatten(0, 1), cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5)
    if name == "flash_attn_with_kvcache":
        arguments = {"q": q, "k_cache": k, "v_cache": v}
        if "cache_leftpad" in options:
            options["cache_seqlens"] = 5
    if name == "flash_attn_qkvpacked_func":
        arguments = {"qkv": torch.stack([q, k, v], dim=2)}
    if name == "flash_attn_kvpacked_func":
        arguments = {"q": q, "kv": torch.stack([k, v], dim=2)}
    result = getattr(flash_attn, name)(**arguments, **options)
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize(
    ("name", "parameter"), [(n, p) for n in SIGNATURES for p in inspect.signature(getattr(flash_attn, n)).parameters]
)
def test_every_parameter_counts_or_is_refused(name: str, parameter: str) -> None:
    if parameter in TENSORS:
        return
    assert (parameter in HONOURED) != (parameter in REFUSED), "a new parameter is honoured or refused"
    if parameter in REFUSED:
        with pytest.raises(Unsupported, match=parameter):
            plain_call(name, **{parameter: REFUSED[parameter]})
        return
    value, changes = HONOURED[parameter]
    assert torch.equal(plain_call(name, **{parameter: value}), plain_call(name)) != changes


def test_a_tensor_of_zeros_is_refused_too() -> None:
    with pytest.raises(Unsupported, match="alibi_slopes"):
        plain_call("flash_attn_func", alibi_slopes=torch.zeros(()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flash_attn_func", dict(window_size=(-2, 0))),
        ("flash_attn_func", dict(window_size=3)),
        ("flash_attn_func", dict(return_attn_probs=1)),
        ("flash_attn_varlen_func", dict(block_table=torch.tensor([[0]]))),
        ("flash_attn_varlen_func", dict(block_table=torch.tensor([[0], [2]]))),
        ("flash_attn_with_kvcache", dict(cache_seqlens=6)),
        ("flash_attn_with_kvcache", dict(cache_seqlens=-1)),
        ("flash_attn_with_kvcache", dict(cache_seqlens=torch.tensor([1, 2, 3]))),
        ("flash_attn_with_kvcache", dict(cache_batch_idx=torch.tensor([0, 2]))),
        ("flash_attn_with_kvcache", dict(cache_batch_idx=torch.tensor([0, 1]), block_table=torch.tensor([[1], [0]]))),
        ("flash_attn_with_kvcache", dict(cache_leftpad=torch.tensor([0, 6]))),
        ("flash_attn_with_kvcache", dict(k=normal(2, 1, 4, 16), cache_seqlens=1)),
        ("flash_attn_with_kvcache", dict(k=normal(2, 1, 4, 16), v=normal(2, 1, 4, 16))),
        ("flash_attn_with_kvcache", dict(k=normal(2, 1, 4, 16), v=normal(2, 2, 4, 16), cache_seqlens=1)),
        ("flash_attn_with_kvcache", dict(k=normal(2, 1, 4, 16), v=normal(2, 1, 4, 16), cache_seqlens=5)),
        ("flash_attn_with_kvcache", dict(k=normal(2, 1, 4, 16).half(), v=normal(2, 1, 4, 16).half(), cache_seqlens=1)),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_a_bad_argument_raises(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(WeftError):
        plain_call(name, **options)


def test_pages_of_keys_and_of_values_that_lie_otherwise_are_refused() -> None:
    """Both hold eight tokens: flattened, they would be taken for the same ones."""
    cu, k, v = torch.tensor([0, 4]), normal(2, 4, 1, 16), normal(4, 2, 1, 16)
    with pytest.raises(WeftError, match="pages of k and v agree"):
        flash_attn.flash_attn_varlen_func(normal(4, 4, 16), k, v, cu, cu, 4, 4, block_table=torch.tensor([[1]]))


def test_two_sequences_that_write_to_one_place_are_refused_and_nothing_is_written() -> None:
    cache, k = torch.zeros(2, 5, 4, 16), normal(2, 1, 4, 16)
    with pytest.raises(WeftError, match="place of its own"):
        flash_attn_with_kvcache(k, cache, cache, k, k, cache_seqlens=1, cache_batch_idx=torch.tensor([1, 1]))
    assert not cache.any()


@pytest.mark.parametrize("which", ["max_seqlen_q", "max_seqlen_k"])
def test_a_longest_length_that_is_too_short_is_refused(which: str) -> None:
    x = normal(7, 2, 16)
    most = {"max_seqlen_q": 4, "max_seqlen_k": 9, which: 3}
    with pytest.raises(WeftError, match=which):
        flash_attn_varlen_func(x, x, x, [0, 3, 7], [0, 3, 7], **most)


def test_gradients_over_a_cache_are_refused() -> None:
    q, cache = normal(2, 1, 4, 16).requires_grad_(), normal(2, 5, 4, 16)
    with pytest.raises(Unsupported, match="no backward"):
        flash_attn_with_kvcache(q, cache, cache)
    with torch.no_grad():
        flash_attn_with_kvcache(q, cache, cache)
