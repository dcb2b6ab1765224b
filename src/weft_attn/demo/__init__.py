"""Demonstrations on real documents: a training over ranks (`weft demo`), and every rank's kernels (`weft check`)."""
