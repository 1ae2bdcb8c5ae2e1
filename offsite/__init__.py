"""The core that all roles share: text, training, models, artefacts, audits, keys, sealing, reports, the command line.

An *owner* distils an *emulator* of a model's middle and ships it with the trainable ends as a
*package*; a *client* tunes an *adapter* on private data and returns a *bundle*; the owner plugs the
adapter into the full model. Neither the data nor the full model moves (arXiv:2302.04870).

Start reading at ``offsite/artefacts/package.py`` and ``offsite/artefacts/bundle.py``: they say what crosses between the
two parties and what is checked when it arrives. Importing this package imports no torch.
"""

__version__ = "0.1.0"

OFFSITE_ROLE = "offsite"

__all__ = [
    "OFFSITE_ROLE",
    "__version__",
    "blockwise",
    "config",
    "console",
    "digests",
    "errors",
    "faults",
    "folders",
    "mapped",
    "problems",
    "stages",
    "staging",
    "strictjson",
    "tensors",
]
