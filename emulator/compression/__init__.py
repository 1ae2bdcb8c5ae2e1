"""Ways of making the middle smaller without training: fewer blocks, fewer MLP channels, lower rank, fewer bits.

A new way is a module here with a function under ``compress.register_compressor``; ``compress`` says the rest.
"""

__all__ = ["activations", "choose", "compress", "finished", "lowrank", "methods", "packed", "unequal", "width"]
