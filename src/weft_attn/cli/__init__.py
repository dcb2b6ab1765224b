"""The command line: `weft`. Each module is one command and holds no logic."""
