"""The published benchmarks, imported from a local folder or from the hub. Use `import_data` of `importing.py`.

    protocols.py    the benchmarks: published counts, prompts, rows, how they are scored
    folder.py       their files in a local folder, checked row by row
    hub.py          their data sets on the hub, converted to the same columns
    importing.py    `echo-lora data import`

Adding a benchmark is a change here; scoring is in `evaluate`, and row formats are in `data`.
"""
