"""PTX that runs for what it does, not for a number that it makes.

An assembly of Gluon has a result, an int32 here that nobody takes, and stays where it is as long as it is not called pure.
"""

from triton.experimental.gluon import language as gl

from weft_attn.kernels.hopper.compat import builtin, value_of


@builtin
def run(text, kinds, operands, _semantic=None):
    """Run PTX of so many operands: $1, $2, ... in `text`, whose registers are its own in braces.

    Args:
        kinds: a letter each: r for 32 bits, l for 64.
    """
    body, result = str(value_of(text)), "mov.u32 $0, 0;"
    gl.inline_asm_elementwise(
        # Within the braces, where there are any: the assembler assigns registers as it comes to them.
        f"{body[:-1]}{result} }}" if body.endswith("}") else f"{body} {result}",
        ",".join(("=r", *value_of(kinds))),
        list(operands),
        dtype=gl.int32,
        is_pure=False,
        pack=1,
        _semantic=_semantic,
    )
