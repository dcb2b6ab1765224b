"""Whatever a model asks for that cannot be served exactly raises; nothing is ignored."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import decoder, exact_attention, tokens
from transformers import AttentionInterface, AttentionMaskInterface

from weft_attn.errors import InvalidInput, Unsupported, WeftError
from weft_attn.integrations import transformers as weft_transformers
from weft_attn.integrations.transformers import attention_forward, make_mask, register

LAYER = SimpleNamespace(training=False, is_causal=True)
ENCODER = SimpleNamespace(training=False, is_causal=False)


def states(rows: int = 5, keys: int = 5, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, 4, rows, 16), k and v (B, 2, keys, 16)."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, h, n, 16, generator=generator) for h, n in ((4, rows), (2, keys), (2, keys)))


def attend(mask: Any, layer: Any = LAYER, rows: int = 5, keys: int = 5, **options: Any) -> torch.Tensor:
    return attention_forward(layer, *states(rows, keys), mask, **options)[0]


@pytest.mark.parametrize(
    "options",
    [
        dict(output_attentions=True),
        dict(position_bias=torch.zeros(1, 4, 5, 5)),
        dict(cache=object()),
        dict(indices=torch.zeros(1)),
        dict(seq_idx=torch.zeros(1)),
        dict(not_known=False),
        dict(scaling=float("nan")),
        dict(scaling=-1.0),
        dict(softcap=-1.0),
        dict(s_aux=torch.zeros(3)),
        dict(sliding_window=3),  # the mask has no window
        dict(cu_seq_lens_q=torch.tensor([0, 5])),
        dict(max_length_q=5),
        dict(cu_seq_lens_q=torch.tensor([0, 5]), cu_seq_lens_k=torch.tensor([0, 5]), max_length_k=4),
        dict(cu_seq_lens_q=torch.tensor([0, 4]), cu_seq_lens_k=torch.tensor([0, 4])),
    ],
    ids=lambda options: "-".join(f"{k}" for k in options),
)
def test_an_argument_that_cannot_be_served_raises(options: dict[str, Any]) -> None:
    with pytest.raises(WeftError):
        attend(make_mask(1, 5, 5), **options)


def test_a_window_of_another_size_than_the_masks_raises_where_it_shows() -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    mask = make_mask(1, 7, 7, mask_function=sliding_window_causal_mask_function(5))
    for size in (3, 6):
        with pytest.raises(WeftError, match=f"a window of {size}, given one of 5"):
            attend(mask, rows=7, keys=7, sliding_window=size)
    assert torch.equal(attend(mask, rows=7, keys=7, sliding_window=5), attend(mask, rows=7, keys=7))
    # Of so few keys no window hides one.
    few = make_mask(1, 4, 4, mask_function=sliding_window_causal_mask_function(5))
    assert torch.equal(attend(few, rows=4, keys=4, sliding_window=9), attend(few, rows=4, keys=4))


def test_dropout_raises_in_training_and_is_nothing_otherwise() -> None:
    with pytest.raises(Unsupported, match="dropout"):
        attend(make_mask(1, 5, 5), SimpleNamespace(training=True), dropout=0.1)
    assert torch.equal(attend(make_mask(1, 5, 5), dropout=0.1), attend(make_mask(1, 5, 5)))
    model = decoder("llama").train()
    model.set_attn_implementation("weft")
    model.model.layers[0].self_attn.attention_dropout = 0.5
    with pytest.raises(Unsupported, match="dropout"):
        model(tokens(1, 5))


def test_a_model_that_is_asked_for_attention_weights_raises() -> None:
    model = decoder("llama")
    model.set_attn_implementation("weft")
    with pytest.raises(Unsupported, match="weights"):
        model(tokens(1, 5), output_attentions=True)


def test_every_harmless_argument_is_one_that_changes_nothing() -> None:
    plain = attend(make_mask(1, 5, 5))
    for name in weft_transformers.HARMLESS:
        assert torch.equal(attend(make_mask(1, 5, 5), **{name: torch.zeros(1)}), plain)


@pytest.mark.parametrize(
    "options",
    [dict(scaling=0.7), dict(softcap=0.5), dict(s_aux=torch.tensor([0.0, 1.0, -1.0, 2.0])), dict(deterministic=True)],
    ids=lambda options: next(iter(options)),
)
def test_an_argument_that_is_served_counts(options: dict[str, Any]) -> None:
    found = attend(make_mask(1, 5, 5), **options)
    causal = torch.ones(1, 1, 5, 5).tril().bool()
    expected, _ = exact_attention(LAYER, *(x.double() for x in states()), causal, **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert "deterministic" in options or not torch.allclose(found, attend(make_mask(1, 5, 5)))


def test_without_a_mask_the_layer_says_what_is_seen() -> None:
    full = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    for layer, options, cells in (
        (LAYER, {}, full.tril()),
        (ENCODER, {}, full),
        (LAYER, dict(is_causal=False), full),
        (ENCODER, dict(is_causal=True), full.tril()),
        (LAYER, dict(sliding_window=2), full.tril() & full.triu(-1)),
        (ENCODER, dict(sliding_window=5), full),
    ):
        expected, _ = exact_attention(None, *states(), cells)
        torch.testing.assert_close(attend(None, layer, **options), expected, rtol=1e-5, atol=1e-6)
    expected, _ = exact_attention(None, *states(1, 5), full[:, :, :1])
    torch.testing.assert_close(attend(None, rows=1), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(Unsupported, match="more keys"):
        attend(None, rows=2)
    with pytest.raises(Unsupported, match="not causal"):
        attend(None, ENCODER, sliding_window=2)


def test_documents_of_a_layer_without_a_mask_are_those_of_its_cu_seq_lens() -> None:
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    cells = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    cells[..., :2, :2] = cells[..., 2:, 2:] = True
    expected, _ = exact_attention(None, *states(), cells)
    found = attend(None, ENCODER, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=3, max_length_k=3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(1, 5, dtype=torch.bool), Unsupported),  # a padding mask that no mask function has seen
        (torch.ones(1, 4, 5, 5, dtype=torch.bool), Unsupported),  # one mask a head
        (torch.ones(1, 1, 5, 6, dtype=torch.bool), Unsupported),
        (torch.ones(1, 1, 5, 5, dtype=torch.int64), Unsupported),
        (torch.full((1, 1, 5, 5), -1.0), Unsupported),  # a bias
    ],
)
def test_a_mask_of_ones_own_that_is_no_mask_of_cells_raises(mask: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        attend(mask)


def test_a_mask_of_other_sizes_raises() -> None:
    with pytest.raises(InvalidInput, match="fit the mask"):
        attend(make_mask(1, 5, 6))


def test_registering_is_public_and_can_be_done_again() -> None:
    register()
    register()
    assert AttentionInterface()["weft"] is attention_forward
    assert AttentionMaskInterface()["weft"] is make_mask


@pytest.mark.parametrize("version", [None, "4.57.1", "5.22.3"])
def test_without_a_tested_transformers_registering_says_which_are(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(weft_transformers.importlib.metadata, "version", asked)
    with pytest.raises(Unsupported, match=r"5\.23 and 5\.24 \(tested\)") as raised:
        register()
    assert ("none" if version is None else version) in str(raised.value)


def test_importing_the_package_or_the_integration_imports_no_transformers() -> None:
    code = "import sys, weft_attn, weft_attn.integrations.transformers; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
