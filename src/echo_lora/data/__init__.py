"""From a file or a task to tokenised rows that have been checked.

What a format is, how a row is tokenised and what is refused belongs here; which rows a recipe uses does not.
"""
