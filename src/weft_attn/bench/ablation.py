"""What each technique is worth: one field of the chosen launch config switched, everything else equal, in the same rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch

from weft_attn.bench.cases import (
    Case,
    Model,
    Sizes,
    chosen_device,
    chosen_tokens,
    decode_case,
    make_tensors,
    square_cases,
    zigzag_case,
)
from weft_attn.bench.one_kernel import Check, KernelRuns, base_choice, kernels_of, measure_configs, needs_kernels
from weft_attn.bench.records import Environment, Record, environment_of
from weft_attn.bench.timing import Notify, Pace, silent
from weft_attn.errors import InvalidInput, require
from weft_attn.launch.config import ForwardConfig, StreamConfig

CHOSEN = "as chosen"
ONE_HEAD, ALL_HEADS = 1, 2**62
# A ForwardConfig that asks for no programs gets no split.
UNSPLIT = 0

Settings = dict[str, StreamConfig]


@dataclass(frozen=True)
class Technique:
    """A switch.

    Attributes:
        name: as the command line has it.
        settings: the chosen config -> configs by setting; empty where the kernel does not have the switch.
        of_split: tried only where the chosen forward splits its keys.
    """

    name: str
    settings: Callable[[StreamConfig], Settings]
    of_split: bool = False


def _cache_modifier(config: StreamConfig) -> Settings:
    # Only loads through pointers have a cache modifier.
    pointers = replace(config, use_tma=False)
    return {f"{modifier!r} without TMA": replace(pointers, cache_modifier=modifier) for modifier in ("", ".cg")}


def _identity_dot(config: StreamConfig) -> Settings:
    if "identity_dot" not in {f.name for f in fields(config)}:
        return {}
    return {_on(value): replace(config, identity_dot=value) for value in (False, True)}  # type: ignore[call-arg]


def _use_tma(config: StreamConfig) -> Settings:
    return {_on(value): replace(config, use_tma=value) for value in (False, True)}


def _l2_order(config: StreamConfig) -> Settings:
    return {
        "one head at a time": replace(config, wave_bytes=ONE_HEAD),
        "all heads together": replace(config, wave_bytes=ALL_HEADS),
    }


def _split_kv(config: StreamConfig) -> Settings:
    return {"off": replace(config, programs_per_sm=UNSPLIT)} if isinstance(config, ForwardConfig) else {}


def _tiles(config: StreamConfig) -> Settings:
    return {"32 x 32": replace(config, block_q=32, block_k=32, num_warps=4, num_stages=1)}


def _on(value: bool) -> str:
    return "on" if value else "off"


TECHNIQUES = (
    Technique("cache_modifier", _cache_modifier),
    Technique("identity_dot", _identity_dot),
    Technique("use_tma", _use_tma),
    Technique("l2_order", _l2_order),
    Technique("split_kv", _split_kv, of_split=True),
    Technique("tiles", _tiles),
)


def chosen_techniques(names: Sequence[str] | None) -> tuple[Technique, ...]:
    """Techniques by name, all for None.

    Raises:
        InvalidInput: an unknown name, or none at all.
    """
    known = {technique.name: technique for technique in TECHNIQUES}
    for name in names or ():
        if name not in known:
            raise InvalidInput(f"the technique is known: expected one of {sorted(known)}, given {name!r}")
    require(names is None or bool(names), "a technique is named", expected=f"one or more of {sorted(known)}", given="none")
    return TECHNIQUES if names is None else tuple(known[name] for name in names)


def ablation_cases(model: Model, sizes: Sizes, seqlen: int | None = None) -> list[Case]:
    """Where techniques are tried: a causal square, one rank's zigzag, one decoding row."""
    tokens, ranks = sizes.zigzag[0]
    return [
        square_cases(model, chosen_tokens(seqlen, sizes.square))[0],
        zigzag_case(model, chosen_tokens(seqlen, tokens), ranks[0], sizes.world),
        decode_case(model, 1, chosen_tokens(seqlen, sizes.decode_keys)),
    ]


@dataclass(frozen=True)
class Request:
    """What to ablate; `seqlen` as in `ablation_cases`."""

    techniques: Sequence[Technique]
    model: Model
    sizes: Sizes
    device_name: str
    pace: Pace
    seqlen: int | None = None


def run_ablation(request: Request, notify: Notify = silent) -> Iterator[list[Record]]:
    """The records of one case after the other. What is asked for is checked before anything runs."""
    cases = ablation_cases(request.model, request.sizes, request.seqlen)
    device = chosen_device(request.device_name)
    needs_kernels(device)
    environment = environment_of(device)
    for case in cases:
        yield ablate_case(case, request.techniques, device, request.pace, environment, notify=notify)


def ablate_case(
    case: Case,
    techniques: Sequence[Technique],
    device: torch.device,
    pace: Pace,
    environment: Environment,
    *,
    notify: Notify = silent,
) -> list[Record]:
    """Records of every kernel of a case under every setting; `ratio_to_weft` is the speed over the chosen config."""
    runs = KernelRuns(case, make_tensors(case, device))
    check = Check.on(runs)
    records = []
    for kernel in (name for pass_name in case.passes for name in kernels_of(pass_name)):
        configs = settings_of(kernel, runs, techniques)
        if len(configs) > 1:
            records += measure_configs(runs, kernel, configs, check, pace, environment, notify=notify)
    return records


def settings_of(kernel: str, runs: KernelRuns, techniques: Sequence[Technique]) -> Settings:
    """The chosen config first, then every setting that differs from it, by "technique: setting"."""
    chosen = base_choice(kernel, runs.case, runs.tensors).config
    assert isinstance(chosen, StreamConfig)
    split = runs.splits_keys()
    found = {CHOSEN: chosen}
    for technique in techniques:
        for setting, config in technique.settings(chosen).items():
            if config != chosen and (split or not technique.of_split):
                found[f"{technique.name}: {setting}"] = config
    return found
