"""The commands, by what they are about. Each parses, calls one function and prints.

They import what they need when they run: torch and transformers take seconds, and `--help` must not.
"""
