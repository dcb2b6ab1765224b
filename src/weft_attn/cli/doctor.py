"""`weft doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from weft_attn.launch.explain import Explanation, Machine

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def doctor(
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Head dim of queries and keys.")] = 128,
    head_dim_v: Annotated[int | None, typer.Option(help="Head dim of values. Default: --head-dim.")] = None,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Dtype of the tensors.")] = "bf16",
    rows: Annotated[int, typer.Option(min=0, help="Query rows.")] = 8192,
    keys: Annotated[int | None, typer.Option(min=0, help="Keys. Default: --rows.")] = None,
    causal: Annotated[bool, typer.Option("--causal/--no-causal", help="Last row aligned with last key.")] = True,
    arch: Annotated[str | None, typer.Option(help="Another target than this machine: sm_90, gfx942, ...")] = None,
) -> None:
    """Say what this machine has, which kernel a problem gets, with which numbers, and why."""
    import torch
    from rich.console import Console

    from weft_attn import checks, ops
    from weft_attn.launch.device import INTERPRETER, target
    from weft_attn.launch.explain import explain, inspect_machine
    from weft_attn.plan import Plan

    keys, head_dim_v = rows if keys is None else keys, head_dim if head_dim_v is None else head_dim_v
    shapes = (rows, heads, head_dim), (keys, kv_heads, head_dim), (keys, kv_heads, head_dim_v)
    q, k, v = (torch.empty(shape, dtype=getattr(torch, DTYPES[dtype]), device="meta") for shape in shapes)
    checks.qkv(q, k, v, packed=True)
    plan = Plan.dense(1, rows, keys, causal=causal)
    asked = None if arch is None else target(arch)

    console = Console()
    machine, interpreted = inspect_machine(), ops.kernels_interpreted()
    console.print(_machine_table(machine, interpreted))
    device = asked or next(iter(machine.devices), INTERPRETER if interpreted else None)
    mask = "causal" if causal else "full"
    console.print(f"[bold]{mask} attention[/] of {rows:,} rows to {keys:,} keys, {heads}/{kv_heads} heads, ", end="")
    console.print(f"head dim {head_dim}/{head_dim_v}, {dtype}: {plan.pairs:,} visible pairs")
    if device is None:
        console.print("kernel: [bold]reference[/] (PyTorch): CPU tensors, and Triton does not interpret its kernels.")
        console.print("For a GPU that is not here: --arch sm_90. For the kernels on the CPU: TRITON_INTERPRET=1.", style="dim")
        return
    how = "[bold]triton[/], in Triton's interpreter" if device is INTERPRETER else "[bold]triton[/]"
    console.print(f"kernel: {how}, on {device.name} ({device.arch}, {device.multiprocessors} multiprocessors)")
    explanation = explain(plan, heads, kv_heads, ops.problem_of(plan, q, k, v), device)
    if explanation.hopper_in_words:
        console.print(explanation.hopper_in_words)
    console.print(explanation.cut_in_words)
    console.print(explanation.backward_in_words)
    console.print(_kernel_table(explanation))


def _machine_table(machine: Machine, interpreted: bool) -> Table:
    from rich.table import Table

    import weft_attn

    table = Table(title="This machine", title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_row("weft", weft_attn.__version__)
    table.add_row("python", machine.python)
    table.add_row("torch", f"{machine.torch}, built for {machine.torch_build}")
    table.add_row("triton", machine.triton or "not installed")
    table.add_row("interpreter", "on (TRITON_INTERPRET=1)" if interpreted else "off")
    table.add_row("CUDA driver", f"serves CUDA {machine.cuda_driver}" if machine.cuda_driver else "none")
    for index, device in enumerate(machine.devices):
        room = f"{device.multiprocessors} multiprocessors, {device.shared_memory:,} bytes of shared memory a program"
        table.add_row(f"GPU {index}", f"{device.name}, {device.arch}, {room}")
    if not machine.devices:
        table.add_row("GPU", "none that torch can use")
    return table


def _kernel_table(explanation: Explanation) -> Table:
    from rich.table import Table

    from weft_attn.launch.explain import numbers

    device = explanation.device
    table = Table(show_header=False, box=None, title_justify="left")
    for each in explanation.kernels:
        needs = f"{each.shared_memory:,} of {device.shared_memory:,} bytes of shared memory"
        if each.registers:
            needs += f", {each.registers} of {device.registers_per_thread} registers for accumulators"
        table.add_row(each.kernel, numbers(each.choice.config))
        table.add_row("", f"from {each.choice.source}; {each.choice.note}".removesuffix("; "), style="dim")
        table.add_row("", needs, style="dim")
    return table
