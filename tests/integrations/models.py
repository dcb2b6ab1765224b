"""Tiny models of transformers with random weights, and how they are compared.

The oracle is the same model in float64 under `exact_attention`: eager gives NaN in float64 where a row sees no key. The baseline
is the model in float32 under eager.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import transformers
from transformers.masking_utils import sdpa_mask

import weft_attn as weft
from weft_attn.integrations.transformers import register
from weft_attn.testing.compare import assert_close_to_oracle

transformers.logging.set_verbosity_error()
register()


def all_cells(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask as transformers computes it, never left out."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def exact_attention(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: Any = None, **options: Any
) -> tuple[torch.Tensor, None]:
    """By definition; a row that sees no key gives 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if options.get("softcap") is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores.masked_fill(~mask, -1e30)
    sinks = options.get("s_aux")
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    probs = torch.softmax(scores, dim=-1)[..., : k.shape[2]] * mask
    return (probs @ v).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("exact", exact_attention)
transformers.AttentionMaskInterface.register("exact", all_cells)

VOCABULARY = 61
SHARED = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=None,
    bos_token_id=1,
)
ALTERNATING = ["sliding_attention", "full_attention"]


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHARED))


def _mistral() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SHARED, sliding_window=5))


def _qwen3() -> Any:
    config = transformers.Qwen3Config(**SHARED, sliding_window=6, use_sliding_window=True, layer_types=ALTERNATING)
    return transformers.Qwen3ForCausalLM(config)


def _gemma2() -> Any:
    config = transformers.Gemma2Config(
        **SHARED, sliding_window=5, layer_types=ALTERNATING, attn_logit_softcapping=2.0, query_pre_attn_scalar=9
    )
    return transformers.Gemma2ForCausalLM(config)


def _gemma3() -> Any:
    config = transformers.Gemma3TextConfig(**SHARED, sliding_window=4, layer_types=ALTERNATING, query_pre_attn_scalar=11)
    return transformers.Gemma3ForCausalLM(config)


def _gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **SHARED, sliding_window=5, layer_types=ALTERNATING, num_local_experts=2, num_experts_per_tok=1
    )
    model = transformers.GptOssForCausalLM(config)
    model.set_experts_implementation("eager")  # the grouped product has no float64
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.randn(4))
    return model


def _llama4() -> Any:
    config = transformers.Llama4TextConfig(
        **SHARED,
        attention_chunk_size=6,
        layer_types=["chunked_attention", "full_attention"],
        intermediate_size_mlp=48,
        num_local_experts=2,
        interleave_moe_layer_step=10,
    )
    return transformers.Llama4ForCausalLM(config)


DECODERS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
}


# Decoders with other layers beside attention that mix rows.
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "qwen3_next": dict(
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "minimax": dict(layer_types=["linear_attention", "full_attention"], num_local_experts=2),
}


def hybrid(name: str) -> Any:
    config = transformers.AutoConfig.for_model(name, **{**SHARED, **HYBRIDS[name]})
    return made(lambda: transformers.AutoModelForCausalLM.from_config(config)).eval()


OF_BERT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "pad_token_id")


def bert() -> Any:
    config = transformers.BertConfig(**{name: SHARED[name] for name in OF_BERT})
    return made(lambda: transformers.BertForMaskedLM(config).eval())


def bert_lm(is_decoder: bool) -> Any:
    config = transformers.BertConfig(**{name: SHARED[name] for name in OF_BERT}, is_decoder=is_decoder)
    return made(lambda: transformers.BertLMHeadModel(config).eval())


def bart() -> Any:
    """An encoder and a decoder with cross attention."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return made(lambda: transformers.BartForConditionalGeneration(config).eval())


def made(build: Callable[[], Any]) -> Any:
    """A model with weights of one seed, far enough from zero that attention is not flat."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(4)
    return model


def decoder(name: str) -> Any:
    return made(DECODERS[name]).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model: Any, attention: str, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and gradients of the loss by parameter."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    grads = {name: x.grad.detach().clone() for name, x in model.named_parameters() if x.grad is not None}
    return output.logits.detach(), grads


def assert_as_eager(model: Any, counted: torch.Tensor | None = None, **inputs: Any) -> None:
    """Logits of the counted tokens and every gradient, against the oracle, no worse than eager allows."""
    oracle = run(copy.deepcopy(model).double(), "exact", inputs)
    eager = run(model, "eager", inputs)
    weft = run(model, "weft", inputs)
    rows = torch.ones_like(weft[0][..., 0], dtype=torch.bool) if counted is None else counted
    assert_close_to_oracle("logits", *(logits[rows] for logits in (weft[0], oracle[0], eager[0])))
    assert weft[1].keys() == oracle[1].keys()
    # Gradients that are zero but for rounding (a key's bias) are measured against the others.
    typical = max(float(grad.square().mean().sqrt()) for grad in oracle[1].values())
    for name, grad in weft[1].items():
        assert_close_to_oracle(name, grad, oracle[1][name], eager[1][name], smallest=typical / 10)


# ---- context parallelism --------------------------------------------------------------------------------------------------


def loss_of(logits: torch.Tensor, labels: torch.Tensor, counted: int) -> torch.Tensor:
    """This rank's part of the mean over the batch's counted labels."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / counted


def steps_on_rank(rank: int, world_size: int, cases: list[tuple[str, str, bool]], cu_seqlens: list[int]) -> list[Any]:
    """(logits of the whole batch, gradients summed over ranks) of each (model, layout, checkpointed) under context parallelism."""
    results = []
    for name, layout, checkpointed in cases:
        cp = weft.ContextParallel(layout=layout, debug=True)
        model = decoder(name)
        model.set_attn_implementation("weft")
        if checkpointed:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = tokens(1, cu_seqlens[-1])[0]
        with cp.batch(cu_seqlens):
            local = cp.shard(cu_seqlens, ids)[None]
            logits = model(local, position_ids=cp.position_ids(cu_seqlens)[None], use_cache=False).logits[0]
            loss = loss_of(logits, cp.shift_labels(cu_seqlens, ids), counted_labels(cu_seqlens))
        loss.backward()
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)
        grads = {name: x.grad for name, x in model.named_parameters()}
        results.append((cp.unshard(cu_seqlens, logits.detach()), grads))
    return results


ROPES = {
    "dynamic": lambda: transformers.LlamaConfig(
        **{**SHARED, "max_position_embeddings": 16}, rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=1e4)
    ),
    "longrope": lambda: transformers.Phi3Config(
        **{name: value for name, value in SHARED.items() if name != "head_dim"},
        original_max_position_embeddings=16,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=1e4,
            partial_rotary_factor=1.0,
            short_factor=[1.0] * 4,
            long_factor=[1.5, 2.0, 4.0, 8.0],
            original_max_position_embeddings=16,
        ),
    ),
    "yarn": lambda: transformers.LlamaConfig(
        **SHARED,
        rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=16),
    ),
}


def ropes_on_rank(rank: int, world_size: int, lengths: tuple[int, ...]) -> dict[tuple[str, int], Any]:
    """(rope, tokens of the one document): its logits under context parallelism and of one process, or why it is refused."""
    cp = weft.ContextParallel()
    results: dict[tuple[str, int], Any] = {}
    for name, config in ROPES.items():
        for length in lengths:
            model = made(lambda config=config: transformers.AutoModelForCausalLM.from_config(config())).eval()  # type: ignore[misc]
            model.set_attn_implementation("weft")
            ids, bounds = tokens(1, length)[0], [0, length]
            with torch.no_grad():
                whole = model(ids[None], use_cache=False).logits[0]
                try:
                    with cp.batch(bounds):
                        local = cp.shard(bounds, ids)[None]
                        logits = model(local, position_ids=cp.position_ids(bounds)[None], use_cache=False).logits[0]
                    results[name, length] = cp.unshard(bounds, logits), whole
                except weft.Unsupported as refusal:
                    results[name, length] = str(refusal)
    return results


def refusals_on_rank(rank: int, world_size: int) -> dict[str, str]:
    """What a model says in debug mode, where rank 1 alone calls it wrongly, or has given it another attention or dropout."""
    cp = weft.ContextParallel(debug=True)
    model = decoder("llama").eval()
    bounds = [0, 11, 20]
    ids, positions = cp.shard(bounds, tokens(1, 20)[0])[None], cp.position_ids(bounds)[None]
    wrong: dict[str, dict[str, Any]] = {
        "no positions": dict(position_ids=None),
        "other positions": dict(position_ids=positions + 1),
        "too few rows": dict(input_ids=ids[:, 1:], position_ids=positions[:, 1:]),
        "a cache": dict(use_cache=True),
        "another attention": {},
        "dropout": {},
        "weights": dict(output_attentions=True),
        "an argument that nobody knows": dict(not_known=1),
        "padding": dict(attention_mask=torch.zeros_like(ids)),
        "a mask of its own": dict(attention_mask=torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)),
        "documents of its own": dict(cu_seq_lens_q=torch.tensor([0, 3]), cu_seq_lens_k=torch.tensor([0, 3])),
    }
    told = {}
    for name, changes in wrong.items():
        given = dict(input_ids=ids, position_ids=positions, use_cache=False) | (changes if rank == 1 else {})
        model.set_attn_implementation("sdpa" if rank == 1 and name == "another attention" else "weft")
        model.train(rank == 1 and name == "dropout")
        model.model.layers[1].self_attn.attention_dropout = 0.1
        try:
            with torch.no_grad(), cp.batch(bounds):
                model(**given)
            told[name] = "nothing"
        except weft.WeftError as refusal:
            told[name] = str(refusal)
    return told


def qwen2_moe() -> Any:
    """Its configs say of the window that no layer has that it is 0."""
    config = transformers.Qwen2MoeConfig(
        **SHARED, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16
    )
    return made(lambda: transformers.Qwen2MoeForCausalLM(config)).eval()


def counted_labels(cu_seqlens: list[int]) -> int:
    lengths = [stop - start for start, stop in pairwise(cu_seqlens)]
    return sum(max(length - 1, 0) for length in lengths)


def step_in_one_process(name: str, attention: str, dtype: torch.dtype, cu_seqlens: list[int]) -> tuple[torch.Tensor, Any]:
    """The same on one process, one document at a time."""
    model = decoder(name).to(dtype)
    model.set_attn_implementation(attention)
    ids = tokens(1, cu_seqlens[-1])
    cp = weft.ContextParallel()
    logits = torch.cat([model(ids[:, start:stop]).logits[0] for start, stop in pairwise(cu_seqlens)])
    loss_of(logits, cp.shift_labels(cu_seqlens, ids[0]), counted_labels(cu_seqlens)).backward()
    return logits.detach(), {name: x.grad for name, x in model.named_parameters()}
