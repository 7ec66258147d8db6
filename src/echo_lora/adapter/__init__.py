"""A trained adapter as files: save and verify, inspect, load, merge, describe. Nothing here trains.

export.py        `save_verified`, `verify_adapter`
inspection.py    `inspect_adapter`: what a folder holds, and its problems
serving.py       which programs take which adapters
merge.py         `load_adapter`, `merge`
files.py         names, tensors, configuration and hash of an adapter
card.py          the model cards of an adapter and of a merged model
"""
