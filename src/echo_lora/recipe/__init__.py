"""One YAML file → objects → a run.

`build` is the only place where recipe keys become models, LoRA configurations and training arguments.
"""
