"""From a file or a task to tokenised, checked rows: sources → forms → template → tokenize → check → prepared.

File formats, the forms of a row, tokenising and its checks belong here; which rows a recipe uses does not.
"""
