"""Models of transformers with attn_implementation="weft" compute what they compute with "eager": logits, gradients, tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import DECODERS, assert_as_eager, bart, bert, bert_lm, decoder, qwen2_moe, run, tokens
from transformers.masking_utils import chunked_causal_mask_function

from weft_attn.errors import Unsupported
from weft_attn.integrations import transformers as weft_transformers
from weft_attn.plan import Plan


def padding(side: str, batch: int, length: int) -> torch.Tensor:
    """(B, length) of 1 and 0: the first sequence is whole, others are not."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for index in range(1, batch):
        cut = 3 * index + 1
        mask[index, : cut if side == "left" else None] = 0 if side == "left" else 1
        if side == "right":
            mask[index, -cut:] = 0
    return mask


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_gives_eager_logits_and_gradients_with_padding(name: str, side: str) -> None:
    ids = tokens(3, 17)
    if side == "none":
        assert_as_eager(decoder(name), input_ids=ids, labels=ids)
        return
    mask = padding(side, 3, 17)
    # A token is predicted from one that is none of padding.
    labels = ids.masked_fill((mask * mask.roll(1, dims=1)) == 0, -100)
    assert_as_eager(decoder(name), mask.bool(), input_ids=ids, attention_mask=mask, labels=labels)


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "gpt_oss"])
def test_packed_position_ids_keep_documents_apart(name: str) -> None:
    positions = torch.cat([torch.arange(n) for n in (7, 1, 12, 3)])[None]
    ids = tokens(1, 23)
    assert_as_eager(decoder(name), input_ids=ids, position_ids=positions, labels=ids, use_cache=False)


@pytest.mark.parametrize(("name", "use_cache"), [("gpt_oss", False), ("gemma2", True), ("llama", True)])
def test_packed_position_ids_that_a_mask_does_not_see_are_cut_by_the_layers(name: str, use_cache: bool) -> None:
    """gpt-oss does not show them to its mask, a model with a cache neither: documents would run into each other."""
    ids, positions = tokens(2, 23), torch.cat([torch.arange(n) for n in (7, 1, 12, 3)])[None]
    model = decoder(name)
    expected = torch.cat([model(part).logits for part in ids.split([7, 1, 12, 3], dim=1)], dim=1)
    model.set_attn_implementation("weft")
    for shown in (positions, positions.expand(2, -1)):
        found = model(ids, position_ids=shown, use_cache=use_cache).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # A mask of ones says that all tokens are one document, whatever their positions.
    whole = dict(position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=use_cache)
    found = model(ids, **whole).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(found, model(ids, **whole).logits, rtol=1e-4, atol=1e-4)


def test_positions_that_jump_but_do_not_begin_again_are_refused() -> None:
    model = decoder("llama")
    model.set_attn_implementation("weft")
    with pytest.raises(ValueError, match="position_ids that jump"):
        model(tokens(1, 6), position_ids=torch.tensor([[0, 1, 2, 5, 6, 7]]), use_cache=True)


def test_chunks_are_not_cut_at_positions_that_their_mask_has_not_seen() -> None:
    chunks = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    q, k, layer = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16), SimpleNamespace(training=False)

    def attend(positions: torch.Tensor) -> None:
        mask = weft_transformers.make_mask(1, 8, 8, mask_function=chunks)
        weft_transformers.attention_forward(layer, q, k, k, mask, position_ids=positions)

    attend(torch.arange(8)[None])
    with pytest.raises(ValueError, match="position_ids that jump"):
        attend(torch.arange(8)[None] % 4)


@pytest.mark.parametrize("side", ["none", "left"])
def test_a_window_of_zero_that_no_layer_has_is_no_obstacle(side: str) -> None:
    """The model asks for the mask nevertheless."""
    model, ids = qwen2_moe(), tokens(3, 17)
    mask = None if side == "none" else padding(side, 3, 17)
    logits = []
    for attention in ("eager", "weft"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits.append(model(ids, attention_mask=mask).logits)
    rows = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(logits[1][rows], logits[0][rows], rtol=1e-4, atol=1e-4)


def test_an_encoder_with_padding_sees_both_ways() -> None:
    ids, mask = tokens(3, 11), padding("right", 3, 11)
    assert_as_eager(bert(), mask.bool(), input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    assert_as_eager(bert(), input_ids=ids, labels=ids)


def test_cross_attention_sees_the_encoder_without_its_padding() -> None:
    ids, mask = tokens(3, 11), padding("right", 3, 11)
    target = tokens(3, 6, seed=1)
    assert_as_eager(bart(), input_ids=ids, attention_mask=mask, labels=target)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_gives_eager_tokens(name: str, cache: str | None) -> None:
    """Prefill and one-token steps, left-padded, past the window of sliding layers and the end of a chunk."""
    model = decoder(name)
    ids, mask = tokens(2, 9), padding("left", 2, 9)
    found = {}
    for attention in ("eager", "weft"):
        model.set_attn_implementation(attention)
        settings = dict(max_new_tokens=7, do_sample=False, cache_implementation=cache, return_dict_in_generate=True)
        output = model.generate(ids, attention_mask=mask, output_logits=True, **settings)
        found[attention] = output.sequences, torch.stack(output.logits)
    assert torch.equal(found["weft"][0], found["eager"][0])
    torch.testing.assert_close(found["weft"][1], found["eager"][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("is_decoder", [False, True], ids=["encoder", "decoder"])
def test_a_language_model_on_an_encoder_generates_eager_tokens(is_decoder: bool, padded: bool) -> None:
    """An encoder asks for the mask of its new tokens alone, and sees all that a cache holds where transformers makes none."""
    model, ids = bert_lm(is_decoder), tokens(2, 7)
    mask = padding("left", 2, 7) if padded else torch.ones_like(ids)
    found = {}
    for attention in ("eager", "weft"):
        model.set_attn_implementation(attention)
        settings = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
        output = model.generate(ids, attention_mask=mask, **settings)
        found[attention] = output.sequences, torch.stack(output.logits)
        several = model(ids[:, :4], use_cache=True).past_key_values
        found[attention] += (model(ids[:, 4:], past_key_values=several).logits,)
    assert torch.equal(found["weft"][0], found["eager"][0])
    for one, other in zip(found["weft"][1:], found["eager"][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_cache_is_continued_by_several_tokens_at_once() -> None:
    model = decoder("gemma3")
    ids = tokens(2, 15)
    outputs = []
    for attention in ("eager", "weft"):
        model.set_attn_implementation(attention)
        first = model(ids[:, :9], use_cache=True)
        outputs.append(model(ids[:, 9:], past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_mask_of_ones_own_is_read_cell_by_cell(kind: str) -> None:
    ids = tokens(2, 9)
    distance = torch.arange(9)[None, :] - torch.arange(9)[:, None]
    mask = ((distance <= 0) & (distance != -2)).expand(2, 1, 9, 9)
    added = torch.zeros(2, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
    model = decoder("llama")
    expected = run(model, "eager", dict(input_ids=ids, labels=ids, attention_mask=added))
    found = run(model, "weft", dict(input_ids=ids, labels=ids, attention_mask=mask if kind == "bool" else added))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    for name, grad in found[1].items():
        torch.testing.assert_close(grad, expected[1][name], rtol=1e-3, atol=1e-4)


def packed_arguments(lengths: list[int]) -> dict[str, Any]:
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return dict(cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=max(lengths), max_length_k=max(lengths))


@pytest.mark.parametrize("with_cache", [False, True], ids=["seen", "unseen"])
def test_cu_seq_lens_keep_documents_apart_as_for_flash_attention(with_cache: bool) -> None:
    lengths = [7, 1, 12, 3]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    inputs = dict(input_ids=tokens(1, 23), position_ids=positions)
    model = decoder("mistral")
    model.set_attn_implementation("eager")
    expected = model(**inputs, use_cache=False).logits
    model.set_attn_implementation("weft")
    found = model(**inputs, **packed_arguments(lengths), use_cache=with_cache).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if not with_cache:
        with pytest.raises(ValueError, match="same documents"):
            model(**inputs, **packed_arguments([7, 1, 11, 4]), use_cache=False)


def test_chunked_layers_say_where_their_documents_come_from() -> None:
    """Their mask is of chunks of documents: no cu_seq_lens says the same."""
    model = decoder("llama4")
    model.set_attn_implementation("weft")
    inputs = dict(input_ids=tokens(1, 23), position_ids=torch.cat([torch.arange(n) for n in (7, 16)])[None], use_cache=False)
    model(**inputs)
    with pytest.raises(Unsupported, match="documents from position_ids"):
        model(**inputs, **packed_arguments([7, 16]))


def test_the_plan_of_a_forward_is_built_once_for_each_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    made: list[int] = []
    honest, set_plan = weft_transformers.plan_attention, Plan._set

    def seen(q: Any, k: Any, v: Any, plan: Plan, **options: Any) -> Any:
        plans.append(plan)
        return honest(q, k, v, plan, **options)

    def counted(plan: Plan, *arguments: Any) -> None:
        made.append(1)
        set_plan(plan, *arguments)

    monkeypatch.setattr(weft_transformers, "plan_attention", seen)
    monkeypatch.setattr(Plan, "_set", counted)
    model = decoder("gemma3")
    model.set_attn_implementation("weft")
    for side in ("left", "right"):
        made.clear()
        model(tokens(2, 9), attention_mask=padding(side, 2, 9))
        assert len(made) == 2
    plans.clear()
    for _ in range(2):
        model(tokens(2, 9))
    assert [plan is plans[i % 2] for i, plan in enumerate(plans)] == [True] * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_run_again_under_the_same_plan(reentrant: bool) -> None:
    model = decoder("gemma2").train()
    ids, mask = tokens(2, 11), padding("left", 2, 11)
    inputs = dict(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
    expected = run(model, "weft", inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = run(model, "weft", inputs)
    for name, grad in found[1].items():
        assert torch.equal(grad, expected[1][name]), name


def test_a_compiled_model_gives_the_same() -> None:
    torch._dynamo.reset()
    model = decoder("gemma3")
    model.set_attn_implementation("weft")
    compiled = torch.compile(model, backend="eager")
    for length, side in ((9, "left"), (11, "right")):
        ids, mask = tokens(2, length), padding(side, 2, length)
        inputs = dict(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        grads = []
        for each in (model, compiled):
            model.zero_grad()
            output = each(**inputs)
            output.loss.backward()
            grads.append((output.logits, model.model.layers[0].self_attn.q_proj.weight.grad))
        for found, expected in zip(grads[1], grads[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_in_one_graph_is_refused_in_words_that_help() -> None:
    torch._dynamo.reset()
    model = decoder("llama")
    model.set_attn_implementation("weft")
    with pytest.raises(Exception, match=r"works outside of compiled graphs: expected torch\.compile without fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(tokens(1, 5))
    torch._dynamo.reset()


def test_autocast_computes_in_its_dtype() -> None:
    model = decoder("qwen3")  # its norms leave queries and keys in float32
    ids = tokens(2, 9)
    outputs = []
    for attention in ("sdpa", "weft"):
        model.set_attn_implementation(attention)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(model(ids).logits.float())
    assert (outputs[0] - outputs[1]).abs().max() < 0.1 * outputs[0].abs().max()
