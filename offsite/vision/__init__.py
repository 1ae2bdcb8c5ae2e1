"""Vision encoders and the images that they read: which models, bytes to pixels, and the numbers that say how."""

__all__ = ["images", "models", "pixels", "reader"]
