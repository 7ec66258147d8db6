"""One YAML file → objects → a run: schema → load → rows → build → plan or train → record → scoring.

`build` is the only place where recipe keys become models, LoRA configurations and training arguments.
"""
