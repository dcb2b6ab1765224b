"""What is measured: suites of cases, each a plan, a model's heads, and the same work as told to an attention without plans."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from weft_attn import checks
from weft_attn.errors import InvalidInput, Unsupported, require
from weft_attn.plan.build import concat_lengths
from weft_attn.plan.cost import backward_flops, forward_flops, kv_bytes
from weft_attn.plan.layouts import Zigzag
from weft_attn.plan.slices import Plan

IntArray = NDArray[np.int64]

SUITES = ("square", "zigzag", "decode", "packed", "host", "plan")
PASSES = ("forward", "backward")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TFLOPS, TERABYTES, CALLS = "TFLOP/s", "TB/s", "calls/s"

LOG_NORMAL_SEED = 20260101
# Of the "host" suite.
HOST_DOCUMENTS = 8
# 38 documents in 64K tokens: mean 1725, median 1.5K.
MEDIAN_OVER_MEAN = 0.87


@dataclass(frozen=True)
class Model:
    """Hq, Hkv, D and the dtype's name."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype_name: str = "bf16"

    def __post_init__(self) -> None:
        require(
            self.dtype_name in DTYPES, "the dtype is known", expected=f"one of {sorted(DTYPES)}", given=repr(self.dtype_name)
        )
        require(
            self.kv_heads >= 1 and self.heads >= 1 and self.heads % self.kv_heads == 0,
            "query heads are a multiple of KV heads",
            expected="Hq % Hkv == 0, both at least 1",
            given=f"Hq={self.heads}, Hkv={self.kv_heads}",
        )
        checks.head_dim(self.head_dim, "the head dim")

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def dtype_bits(self) -> int:
        return self.dtype.itemsize * 8

    @property
    def name(self) -> str:
        return f"Hq {self.heads}, Hkv {self.kv_heads}, D {self.head_dim}, {self.dtype_name}"


HOUSE_MODEL = Model()
QUICK_MODEL = Model(heads=4, kv_heads=2, head_dim=64)


def chosen_model(
    *, quick: bool, heads: int | None, kv_heads: int | None, head_dim: int | None, dtype_name: str | None
) -> Model:
    """The house's model, or a small one, with what was asked for in place of its own."""
    own = QUICK_MODEL if quick else HOUSE_MODEL
    asked: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype_name": dtype_name}
    return replace(own, **{name: value for name, value in asked.items() if value is not None})


@dataclass(frozen=True)
class DenseBatch:
    """`batch` sequences of equal length."""

    batch: int
    seqlen_q: int
    seqlen_k: int


@dataclass(frozen=True)
class PackedDocuments:
    """Documents one after the other, rows and keys alike; cu_seqlens (documents + 1,)."""

    cu_seqlens: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(np.diff(self.cu_seqlens).tolist())


@dataclass(frozen=True)
class Prefix:
    """Query rows [q_start, q_stop) see, causally, the first k_stop keys in sequence order."""

    q_start: int
    q_stop: int
    k_stop: int


@dataclass(frozen=True, eq=False)
class PrefixGroups:
    """Groups of rows over prefixes of one document, whose keys lie in the order of an all-gather.

    Attributes:
        prefixes: the groups, shortest prefix first.
        key_rows: (total_k,) the plan's key row that holds sequence position p: indexing with it reorders to sequence order.
        q_position, k_position: (total_q,), (total_k,) sequence position of each row and key of the plan.
    """

    prefixes: tuple[Prefix, ...]
    key_rows: IntArray
    q_position: IntArray
    k_position: IntArray


@dataclass(frozen=True, eq=False)
class Case:
    """One piece of work to measure.

    Attributes:
        plan: who attends to whom.
        layout: the same as an attention without plans has to be told.
        unit: TFLOPS where arithmetic is the limit, TERABYTES (of K and V, read once) where memory is, CALLS where the host is.
        passes: which of PASSES are measured.
        deterministic: bitwise repeatable gradients are asked of every peer.
    """

    suite: str
    name: str
    plan: Plan
    layout: DenseBatch | PackedDocuments | PrefixGroups
    model: Model
    causal: bool
    unit: str = TFLOPS
    passes: tuple[str, ...] = PASSES
    deterministic: bool = False

    @property
    def plan_digest(self) -> str:
        """Twelve hex digits that two runs of the same plan share."""
        totals = np.array([self.plan.total_q, self.plan.total_k], dtype=np.int64)
        return hashlib.sha256(totals.tobytes() + self.plan.table.numpy().tobytes()).hexdigest()[:12]

    def rate(self, pass_name: str, milliseconds: float) -> float:
        """TFLOP/s over visible pairs, TB/s of K and V, or calls/s, of a pass that takes `milliseconds`."""
        if self.unit == CALLS:
            return 1e3 / milliseconds
        model = self.model
        if self.unit == TERABYTES:
            amount: float = kv_bytes(self.plan, model.kv_heads, model.head_dim, model.head_dim, model.dtype_bits)
        elif pass_name == "forward":
            amount = forward_flops(self.plan, model.heads, model.head_dim)
        else:
            amount = backward_flops(self.plan, model.heads, model.head_dim)
        return amount / (milliseconds * 1e-3) / 1e12


@dataclass(frozen=True)
class Sizes:
    """Sizes of the suites, in tokens.

    Attributes:
        square: tokens of the square cases.
        zigzag: (tokens of the document, ranks) pairs; world: ranks in all.
        decode_keys, decode_rows: keys, and numbers of query rows.
        packed: tokens of the packed cases; documents: how many of log-normal length; short: length of the equal short ones.
        plan_documents: documents of the plan-building suite.
    """

    square: int
    zigzag: tuple[tuple[int, tuple[int, ...]], ...]
    world: int
    decode_keys: int
    decode_rows: tuple[int, ...]
    packed: int
    documents: int
    short: int
    plan_documents: int


HOUSE = Sizes(
    square=16384,
    zigzag=((65536, (0, 3, 7)), (8192, (3,))),
    world=8,
    decode_keys=131072,
    decode_rows=(1, 16),
    packed=65536,
    documents=38,
    short=256,
    plan_documents=1000,
)
# For smoke runs: every path, no figure worth quoting.
QUICK = Sizes(
    square=256,
    zigzag=((256, (0,)),),
    world=4,
    decode_keys=512,
    decode_rows=(1, 16),
    packed=512,
    documents=4,
    short=64,
    plan_documents=50,
)


# ---- suites ---------------------------------------------------------------------------------------------------------------


def suite_cases(
    suite: str,
    sizes: Sizes,
    model: Model,
    *,
    seqlen: int | None = None,
    world: int | None = None,
    rank: int | str | None = None,
    passes: Sequence[str] | None = None,
    deterministic: bool = False,
) -> list[Case]:
    """The cases of a suite.

    Args:
        suite: one of SUITES but "plan", which has no device work.
        sizes: HOUSE or QUICK.
        seqlen: tokens in place of the suite's own (keys for "decode").
        world, rank: of "zigzag"; rank "all" is every rank, None the suite's own.
        passes: which passes; None: all that the suite has.
        deterministic: ask every peer for bitwise repeatable gradients.

    Raises:
        InvalidInput: an unknown suite, rank or pass, a pass that the suite does not have, or no tokens or ranks.
    """
    ranks = chosen_world(world, sizes)
    if suite == "square":
        found = square_cases(model, chosen_tokens(seqlen, sizes.square))
    elif suite == "zigzag":
        work = [(chosen_tokens(seqlen, tokens), own_ranks) for tokens, own_ranks in sizes.zigzag]
        found = _zigzag_suite(model, work if seqlen is None else work[:1], ranks, rank)
    elif suite == "decode":
        keys = chosen_tokens(seqlen, sizes.decode_keys)
        found = [decode_case(model, rows, keys) for rows in sizes.decode_rows]
    elif suite == "packed":
        tokens = chosen_tokens(seqlen, sizes.packed)
        documents = max(2, round(sizes.documents * tokens / sizes.packed))
        found = [
            packed_case(model, f"{documents} log-normal documents", log_normal_lengths(documents, tokens)),
            packed_case(model, f"documents of {sizes.short}", equal_lengths(sizes.short, tokens)),
        ]
    elif suite == "host":
        found = [host_case(model, sizes.short, chosen_tokens(seqlen, HOST_DOCUMENTS * sizes.short))]
    else:
        raise InvalidInput(f"the suite is known: expected one of {SUITES}, given {suite!r}")
    return [replace(case, passes=_chosen_passes(case, passes), deterministic=deterministic) for case in found]


def chosen_tokens(seqlen: int | None, own: int) -> int:
    """The tokens that were asked for, or a suite's own."""
    require(seqlen is None or seqlen >= 1, "seqlen counts tokens", expected=">= 1", given=seqlen)
    return own if seqlen is None else seqlen


def chosen_world(world: int | None, sizes: Sizes) -> int:
    """The ranks that were asked for, or the sizes' own."""
    require(world is None or world >= 1, "world counts ranks", expected=">= 1", given=world)
    return sizes.world if world is None else world


def square_cases(model: Model, seqlen: int) -> list[Case]:
    """Causal and full attention of one sequence, and a causal batch of four quarters."""
    quarter = max(1, seqlen // 4)
    return [
        _dense_case("square", f"causal {tokens_in_words(seqlen)}", model, DenseBatch(1, seqlen, seqlen), causal=True),
        _dense_case("square", f"full {tokens_in_words(seqlen)}", model, DenseBatch(1, seqlen, seqlen), causal=False),
        _dense_case("square", f"causal 4 x {tokens_in_words(quarter)}", model, DenseBatch(4, quarter, quarter), causal=True),
    ]


def decode_case(model: Model, rows: int, keys: int) -> Case:
    """A few rows, each of which sees every key: K and V are read once, nothing else matters."""
    case = _dense_case("decode", f"{rows} x {tokens_in_words(keys)} keys", model, DenseBatch(1, rows, keys), causal=False)
    return replace(case, unit=TERABYTES, passes=("forward",))


def host_case(model: Model, length: int, tokens: int) -> Case:
    """Work so short that a call costs as long as the host needs to give it to the GPU."""
    case = packed_case(model, f"documents of {length}", equal_lengths(length, tokens))
    return replace(case, suite="host", unit=CALLS)


def packed_case(model: Model, name: str, lengths: Sequence[int]) -> Case:
    """Causal packed documents."""
    cu_seqlens = concat_lengths(lengths)
    return Case(
        suite="packed",
        name=f"{tokens_in_words(int(cu_seqlens[-1]))} tokens, {name}",
        plan=Plan.from_cu_seqlens(cu_seqlens, cu_seqlens, causal=True),
        layout=PackedDocuments(tuple(cu_seqlens.tolist())),
        model=model,
        causal=True,
    )


def zigzag_case(model: Model, seqlen: int, rank: int, world: int) -> Case:
    """One rank's rows of one document over the keys as an all-gather leaves them."""
    plan = Plan.zigzag([0, seqlen], rank=rank, world_size=world)
    layout = Zigzag.of(np.array([0, seqlen], dtype=np.int64), world)
    bounds, sizes, local = layout.bounds[0], layout.sizes[0], layout.local_starts[0]
    owned = layout.owned_chunks(rank)
    prefixes = tuple(
        Prefix(int(local[chunk]), int(local[chunk] + sizes[chunk]), int(bounds[chunk + 1])) for chunk in owned if sizes[chunk]
    )
    chunks = np.arange(2 * world)
    rank_starts = np.cumsum(layout.rank_tokens) - layout.rank_tokens
    first_rows = local + rank_starts[layout.owner(chunks)]
    key_rows = np.concatenate([np.arange(first_rows[j], first_rows[j] + sizes[j]) for j in chunks])
    k_position = np.empty_like(key_rows)
    k_position[key_rows] = np.arange(seqlen)
    q_position = np.concatenate([np.arange(bounds[chunk], bounds[chunk + 1]) for chunk in owned])
    return Case(
        suite="zigzag",
        name=f"{tokens_in_words(seqlen)}, rank {rank} of {world}",
        plan=plan,
        layout=PrefixGroups(prefixes, key_rows, q_position, k_position),
        model=model,
        causal=True,
    )


def _dense_case(suite: str, name: str, model: Model, batch: DenseBatch, *, causal: bool) -> Case:
    plan = Plan.dense(batch.batch, batch.seqlen_q, batch.seqlen_k, causal=causal)
    return Case(suite=suite, name=name, plan=plan, layout=batch, model=model, causal=causal)


def _zigzag_suite(model: Model, work: Sequence[tuple[int, tuple[int, ...]]], world: int, rank: int | str | None) -> list[Case]:
    require(rank in (None, "all") or str(rank).isdecimal(), "rank is a rank", expected='an integer or "all"', given=repr(rank))
    chosen = None if rank is None else tuple(range(world)) if rank == "all" else (int(rank),)
    return [
        zigzag_case(model, tokens, one, world)
        for tokens, ranks in work
        for one in chosen or tuple(sorted({min(r, world - 1) for r in ranks}))
    ]


def asked_passes(name: str) -> tuple[str, ...] | None:
    """Passes by their name on a command line; None for "both": all that a suite has.

    Raises:
        InvalidInput: an unknown name.
    """
    require(name in (*PASSES, "both"), "the pass is known", expected=f"one of {(*PASSES, 'both')}", given=repr(name))
    return None if name == "both" else (name,)


def comma_separated(text: str | None) -> list[str] | None:
    """Names of a list as written on a command line; None for none given."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _chosen_passes(case: Case, passes: Sequence[str] | None) -> tuple[str, ...]:
    if passes is None:
        return case.passes
    for name in passes:
        require(name in case.passes, f"the {case.suite} suite has the pass", expected=f"one of {case.passes}", given=repr(name))
    return tuple(passes)


# ---- lengths --------------------------------------------------------------------------------------------------------------


def log_normal_lengths(documents: int, total: int, seed: int = LOG_NORMAL_SEED) -> list[int]:
    """`documents` log-normal lengths that sum to `total` exactly, each at least 1; the same for the same arguments.

    The spread follows from MEDIAN_OVER_MEAN: a log-normal has sigma^2 = 2 log(mean / median).
    """
    require(1 <= documents <= total, "every document has a token", expected=f"1 <= documents <= {total}", given=documents)
    sigma = math.sqrt(2 * math.log(1 / MEDIAN_OVER_MEAN))
    drawn = np.random.default_rng(seed).lognormal(0.0, sigma, documents)
    # One token each, the rest in proportion; what rounding leaves goes to the largest remainders.
    share = drawn / drawn.sum() * (total - documents)
    lengths = 1 + np.floor(share).astype(np.int64)
    missing = total - int(lengths.sum())
    lengths[np.argsort(np.floor(share) - share, kind="stable")[:missing]] += 1
    return [int(x) for x in lengths]


def equal_lengths(length: int, total: int) -> list[int]:
    """Documents of `length` that fill `total`; the last takes what is left."""
    whole, rest = divmod(total, length)
    return [length] * whole + ([rest] if rest else [])


def tokens_in_words(tokens: int) -> str:
    """16384 -> "16K"; numbers that are no whole Ki stay as they are."""
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


# ---- devices and tensors --------------------------------------------------------------------------------------------------


def chosen_device(name: str) -> torch.device:
    """A torch device by name.

    Raises:
        InvalidInput: no device has such a name.
        Unsupported: the device is not here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(f"the device is known: expected cuda, cuda:N or cpu, given {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Unsupported(f"the device is here: expected a CUDA or ROCm GPU for {name!r}, given none (cpu runs the reference)")
    return device


@dataclass(frozen=True)
class Tensors:
    """A case's inputs.

    Attributes:
        q: (total_q, Hq, D).
        kv: copies of (k, v), (total_k, Hkv, D) each. More than one where memory is measured: a call takes the next copy, so
            that what it reads is not in the L2 cache from the call before.
        dout: (total_q, Hq, D) gradient of the output.
    """

    q: torch.Tensor
    kv: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    dout: torch.Tensor

    @property
    def k(self) -> torch.Tensor:
        return self.kv[0][0]

    @property
    def v(self) -> torch.Tensor:
        return self.kv[0][1]

    @property
    def device(self) -> torch.device:
        return self.q.device

    def turn(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The (k, v) of call number `index`."""
        return self.kv[index % len(self.kv)]


def make_tensors(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Normal random inputs of a case, the same for the same seed and device."""
    model = case.model
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, model.head_dim, generator=generator, device=device, dtype=model.dtype)

    q, dout = draw(case.plan.total_q, model.heads), draw(case.plan.total_q, model.heads)
    k, v = draw(case.plan.total_k, model.kv_heads), draw(case.plan.total_k, model.kv_heads)
    copies = kv_copies(2 * k.numel() * k.element_size(), l2_bytes(device)) if case.unit == TERABYTES else 1
    return Tensors(q, tuple((k, v) if i == 0 else (k.clone(), v.clone()) for i in range(copies)), dout)


def kv_copies(bytes_each: int, cache_bytes: int) -> int:
    """Copies of K and V so that between two uses of one the others push twice the cache's size through it."""
    return 1 + max(1, -(-2 * cache_bytes // max(1, bytes_each)))


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache; 0 for the CPU, where no figure is quoted."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0
