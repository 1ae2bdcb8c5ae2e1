"""What every HTTP server of the owner needs: sockets, TLS, limits on connections and bodies, refusals."""

__all__ = ["bodies", "certificates", "config", "connections", "refusals", "serve"]
