"""The demo as torchrun starts it: `torchrun --nproc-per-node 8 -m weft_attn.demo`, with `weft demo`'s options."""

import sys

from weft_attn.cli.main import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
