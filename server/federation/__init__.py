"""``offsite federate serve`` and ``simulate``: rounds of a federation at the owner's."""

__all__ = ["config", "serve", "simulation", "simulationconfig"]
