"""Ways of making the middle smaller without training: dropping blocks, keeping some MLP channels.

A new way is a module here that calls ``compress.register_compressor``.
"""

__all__ = ["activations", "choose", "compress", "methods"]
