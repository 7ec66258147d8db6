"""A trained adapter as files: save and prove, inspect, merge, describe.

Nothing here trains.
"""
