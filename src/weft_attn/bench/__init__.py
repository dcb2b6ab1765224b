"""Measuring Weft beside its peers: checked first, interleaved, on pairs counted from the plan."""
