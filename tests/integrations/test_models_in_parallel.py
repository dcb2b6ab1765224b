"""Models inside `ContextParallel.batch`: two processes give what one gives, and what cannot be said there is refused."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import (
    HYBRIDS,
    OF_BERT,
    SHARED,
    decoder,
    hybrid,
    refusals_on_rank,
    ropes_on_rank,
    step_in_one_process,
    steps_on_rank,
    tokens,
)

import weft_attn as weft
from weft_attn.errors import InvalidInput, Unsupported, WeftError
from weft_attn.integrations.transformers import attention_forward, make_mask
from weft_attn.testing.compare import assert_close_to_oracle
from weft_attn.testing.ranks import run_ranks

# Documents of odd lengths, one of one token, one shorter than the ranks' chunks.
CU_SEQLENS = [0, 17, 18, 21, 34]
CASES = [("llama", "zigzag", False), ("gemma3", "zigzag", True), ("gemma2", "striped", False), ("gpt_oss", "contiguous", False)]


@pytest.fixture(scope="module")
def ranks() -> list[list[Any]]:
    return run_ranks(steps_on_rank, 2, CASES, CU_SEQLENS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_two_processes_give_the_logits_and_gradients_of_one(case: tuple[str, str, bool], ranks: list[list[Any]]) -> None:
    oracle = step_in_one_process(case[0], "exact", torch.float64, CU_SEQLENS)
    eager = step_in_one_process(case[0], "eager", torch.float32, CU_SEQLENS)
    typical = max(float(grad.square().mean().sqrt()) for grad in oracle[1].values())
    for of_rank in ranks:
        logits, grads = of_rank[CASES.index(case)]
        assert_close_to_oracle("logits", logits, oracle[0], eager[0])
        for name, grad in grads.items():
            assert_close_to_oracle(name, grad, oracle[1][name], eager[1][name], smallest=typical / 10)


def refused_batch(rank: int, _world_size: int) -> None:
    cp, model, cu_seqlens = weft.ContextParallel(), decoder("llama"), [0, 1]
    model.set_attn_implementation("weft")
    ids, positions = cp.shard(cu_seqlens, torch.tensor([5]))[None], cp.position_ids(cu_seqlens)[None]
    with pytest.raises((Unsupported, IndexError)) as raised, cp.batch(cu_seqlens):
        model(ids, position_ids=positions, use_cache=False)
    # transformers fails on the empty rank before it asks for a mask.
    assert raised.type is Unsupported or ids.shape[1] == 0, rank


def test_a_batch_that_leaves_a_rank_without_a_row_is_refused_by_the_others_too() -> None:
    """They would wait for it in their first layer."""
    run_ranks(refused_batch, 2, timeout=60)


# ---- refusals, on one process ----------------------------------------------------------------------------------------------


@pytest.fixture
def llama() -> Any:
    model = decoder("llama")
    model.set_attn_implementation("weft")
    return model


CP = weft.ContextParallel()
POSITIONS = CP.position_ids(CU_SEQLENS)[None]
IDS = tokens(1, 34)
INPUTS: dict[str, Any] = dict(input_ids=IDS, position_ids=POSITIONS, use_cache=False)


def test_a_batch_of_one_rank_is_the_packed_batch(llama: Any) -> None:
    expected = llama(**INPUTS).logits
    with CP.batch(CU_SEQLENS):
        assert torch.equal(llama(**INPUTS).logits, expected)
        assert torch.equal(llama(**INPUTS, attention_mask=torch.ones(1, 34)).logits, expected)
    assert torch.equal(llama(**INPUTS).logits, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_under_another_attention_does_not_pass_for_one_that_sees_all_ranks(attention: str, llama: Any) -> None:
    llama.set_attn_implementation(attention)
    with pytest.raises(InvalidInput, match=r"attn_implementation='weft'.*nothing attended"), CP.batch(CU_SEQLENS):
        llama(**INPUTS)
    llama.set_attn_implementation("weft")
    with pytest.raises(RuntimeError, match="its own"), CP.batch(CU_SEQLENS):
        raise RuntimeError("an error of its own says more")
    compiled = torch.compile(llama, backend="eager")
    for _ in range(2):
        with CP.batch(CU_SEQLENS):
            compiled(**INPUTS)


def test_a_model_that_attends_in_its_own_way_is_noticed() -> None:
    """Some models of transformers take the name of any attention and attend as they always do."""
    config = transformers.MegatronBertConfig(**{name: SHARED[name] for name in OF_BERT}, is_decoder=True)
    model = transformers.MegatronBertForCausalLM(config).eval()
    model.set_attn_implementation("weft")
    with pytest.raises(InvalidInput, match="nothing attended"), CP.batch(CU_SEQLENS):
        model(**INPUTS)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(position_ids=None), "position"),
        (dict(position_ids=torch.arange(34)[None]), "position"),
        (dict(position_ids=POSITIONS.roll(1, dims=1)), "position"),
        (dict(use_cache=True), "use_cache=False"),
        (dict(attention_mask=(torch.arange(34) < 30)[None]), "padding"),
        (dict(attention_mask=torch.ones(1, 1, 34, 34, dtype=torch.bool)), "attention_mask"),
        (dict(input_ids=IDS[:, :30], position_ids=POSITIONS[:, :30]), "rank's rows"),
        (dict(input_ids=IDS.expand(2, -1)), "batch size 1"),
        (dict(cu_seq_lens_q=torch.tensor(CU_SEQLENS), cu_seq_lens_k=torch.tensor(CU_SEQLENS)), "cu_seq_lens"),
        (dict(output_attentions=True), "weights"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_a_batch_does_not_know_is_refused(llama: Any, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(WeftError, match=said), CP.batch(CU_SEQLENS):
        llama(**{**INPUTS, **changed})


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss"])
def test_a_cache_that_a_batch_would_fill_is_refused_however_it_comes(name: str) -> None:
    """It would hold one rank's keys, and what is decoded with it after the batch would be wrong without a word."""
    model = decoder(name)
    model.set_attn_implementation("weft")
    for changed in (
        dict(use_cache=True),
        dict(use_cache=None),
        dict(past_key_values=transformers.DynamicCache(config=model.config)),
    ):
        with torch.no_grad(), pytest.raises(Unsupported, match="KV cache"), CP.batch(CU_SEQLENS):
            model(**{**INPUTS, **changed})
    with torch.no_grad(), CP.batch(CU_SEQLENS):
        model(**INPUTS)
    model.train()
    with CP.batch(CU_SEQLENS):
        model(**{**INPUTS, "use_cache": None})


def test_positions_are_looked_at_by_the_layers_of_a_model_that_does_not_show_them_to_its_mask() -> None:
    model = decoder("gpt_oss")
    model.set_attn_implementation("weft")
    with CP.batch(CU_SEQLENS):
        model(**INPUTS)
        with pytest.raises(InvalidInput, match="position"):
            model(IDS, use_cache=False)
        with pytest.raises(Unsupported, match="use_cache"):
            model(**{**INPUTS, "use_cache": True})


def test_positions_are_compared_on_the_host_wherever_new_tensors_lie() -> None:
    q, k, layer = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16), SimpleNamespace(training=False)
    for cu_seqlens, refusal in (
        ([0, 9], nullcontext()),
        ([0, 4, 9], pytest.raises(InvalidInput, match="none that its layers show")),
    ):
        with refusal, CP.batch(cu_seqlens), torch.device("meta"):
            attention_forward(layer, q, k, k, make_mask(1, 9, 9, device="cpu"))


def test_a_model_in_training_may_fill_a_cache_that_it_drops(llama: Any) -> None:
    """Models fill one unless told not to; nobody generates with a model in training."""
    llama.train()
    expected = llama(**INPUTS).logits
    with CP.batch(CU_SEQLENS):
        assert torch.equal(llama(IDS, position_ids=POSITIONS).logits, expected)
        with pytest.raises(InvalidInput, match="position"):
            llama(IDS)


def test_a_cache_that_holds_keys_is_refused(llama: Any) -> None:
    cache = llama(IDS[:, :5], use_cache=True).past_key_values
    with pytest.raises(Unsupported, match="KV cache"), CP.batch([0, 6]):
        llama(IDS[:, 5:11], past_key_values=cache)
    static = transformers.StaticCache(config=llama.config, max_cache_len=40)
    with pytest.raises(Unsupported, match="KV cache"), CP.batch([0, 34]):
        llama(IDS, past_key_values=static)


def test_chunked_layers_and_encoders_are_refused() -> None:
    model = decoder("llama4")
    model.set_attn_implementation("weft")
    with pytest.raises(Unsupported, match="sliding-window layers"), CP.batch(CU_SEQLENS):
        model(**INPUTS)
    with pytest.raises(Unsupported, match="decoders"), CP.batch([0, 4]):
        make_mask(1, 4, 4, mask_function=transformers.masking_utils.bidirectional_mask_function)


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_that_mix_rows_by_themselves_are_refused(name: str) -> None:
    """A convolution over a rank's rows mixes rows that are no neighbours: other logits, without a word."""
    model = hybrid(name)
    model.set_attn_implementation("weft")
    model(**INPUTS)
    with pytest.raises(Unsupported, match=r"in attention alone: .* given (conv|linear_attention)"), CP.batch(CU_SEQLENS):
        model(**INPUTS)


def test_positions_that_do_not_begin_at_0_are_refused() -> None:
    """RoBERTa embeds its first token's position as pad_token_id + 1, and is given 0."""
    config = transformers.RobertaConfig(**{name: SHARED[name] for name in OF_BERT}, is_decoder=True)
    model = transformers.RobertaForCausalLM(config).eval()
    model.set_attn_implementation("weft")
    model(**INPUTS)
    with pytest.raises(Unsupported, match=r"positions from 0: .* given roberta"), CP.batch(CU_SEQLENS):
        model(**INPUTS)


def test_rope_that_follows_the_largest_position_is_refused_where_ranks_would_disagree() -> None:
    """Each rank is given its own rows' positions alone."""
    first, second = run_ranks(ropes_on_rank, 2, (16, 20))
    for (name, length), one in first.items():
        other = second[name, length]
        if name != "yarn" and length > 16:
            assert one == other
            assert f"at most 16 tokens with rope_type '{name}'" in one
        else:
            for logits, whole in (one, other):
                torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert len(first) == 6


def test_in_debug_mode_all_ranks_raise_where_one_calls_the_model_wrongly() -> None:
    """Before any attention has compared its call."""
    first, refusing = run_ranks(refusals_on_rank, 2, timeout=60)
    assert len(refusing) == 11
    for name, said in refusing.items():
        assert said != "nothing", name
        assert "given one by rank 1" not in said, "its own reason"
        assert "given one by rank 1" in first[name], name


def test_a_mask_belongs_to_the_batch_that_it_was_made_in() -> None:
    q, k = torch.randn(1, 4, 4, 16), torch.randn(1, 2, 4, 16)
    layer = SimpleNamespace(training=False)
    with CP.batch([0, 4]):
        inside = make_mask(1, 4, 4)
        expected, _ = attention_forward(layer, q, k, k, inside)
    outside = make_mask(1, 4, 4)
    with pytest.raises(InvalidInput, match="made in"), CP.batch([0, 4]):
        attention_forward(layer, q, k, k, outside)
    with pytest.raises(InvalidInput, match="made in"), CP.batch([0, 4]):
        attention_forward(layer, q, k, k, inside)
    # As in a checkpoint's recomputation, after the block has ended.
    assert torch.equal(attention_forward(layer, q, k, k, inside)[0], expected)


@pytest.mark.parametrize(
    "options",
    [dict(softcap=0.5), dict(scaling=0.3), dict(s_aux=torch.tensor([0.5, 1.0, -1.0, 2.0])), dict(sliding_window=2)],
    ids=lambda options: next(iter(options)),
)
def test_a_layers_options_reach_the_batch(options: dict[str, Any]) -> None:
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    layer = SimpleNamespace(training=False, is_causal=True)
    plain, _ = attention_forward(layer, q, k, k, None)
    expected, _ = attention_forward(layer, q, k, k, None, **options)
    with CP.batch([0, 9]):
        found, _ = attention_forward(layer, q, k, k, None, **options)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, plain)


def test_a_layer_that_is_not_causal_sees_the_whole_document() -> None:
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    layer = SimpleNamespace(training=False, is_causal=False)
    cu_seqlens = [0, 4, 9]
    with CP.batch(cu_seqlens):
        found, _ = attention_forward(layer, q, k, k, None)
    packed = (x[0].transpose(0, 1) for x in (q, k, k))
    assert torch.equal(found[0], weft.varlen_attention(*packed, cu_seqlens, cu_seqlens))
