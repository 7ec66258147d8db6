"""Echo-LoRA itself: the echo path, the shared-prefix step, the losses, the routing, and the model that holds them.

Nothing here knows of recipes, files or trainers.
"""
