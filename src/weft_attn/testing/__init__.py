"""What tests and benchmarks share: named plans and cases, and the one tolerance policy."""
