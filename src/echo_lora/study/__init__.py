"""Studies: whether one arm is better than another, over several seeds, with its uncertainty."""
