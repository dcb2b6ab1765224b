"""Weft under other libraries' names: transformers' attention interface, flash-attn's functions. Imported on request only."""
