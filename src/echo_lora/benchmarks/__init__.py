"""The published benchmarks: their prompts and scoring, read from a local copy or from the hub."""
