"""Ways of making the middle smaller without training: dropping blocks, keeping some MLP channels.

A new way is a module here with a function under ``compress.register_compressor``; ``compress`` says the rest.
"""

__all__ = ["activations", "choose", "compress", "finished", "methods", "width"]
