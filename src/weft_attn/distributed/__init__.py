"""Context parallelism: documents cut over the ranks of a process group, attention over the keys of all of them."""
