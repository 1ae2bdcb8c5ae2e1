"""Settings of a distillation that do not go with the kind of its model, in one line each."""

from __future__ import annotations

from pathlib import Path

from emulator.distillation.config import DistillConfig
from offsite.errors import ConfigError
from offsite.modelling.load import is_encoder_name, is_seq2seq_name
from offsite.seq2seq.refusals import refuse_settings


def require_fitting(config: DistillConfig) -> None:
    """Return only if the settings go with the model: a decoder, an encoder, or an encoder-decoder's two stacks.

    No weight is read.

    Raises:
        ConfigError: naming those that do not.
    """
    if is_seq2seq_name(config.model):
        _require_of_two_stacks(config)
    elif "stacks" in config.model_fields_set:
        raise ConfigError(f"--stacks: model {Path(config.model).name!r} has no encoder beside its decoder")
    elif is_encoder_name(config.model):
        _require_of_encoder(config)


def _require_of_encoder(config: DistillConfig) -> None:
    """Nothing is asked that needs scores of next tokens: an encoder has none."""
    if found := [flag for flag, is_asked in _of_next_tokens(config).items() if is_asked]:
        raise ConfigError(
            f"model {Path(config.model).name!r} is an encoder: {' and '.join(found)} would need scores of next tokens",
            hint="leave it out; --steps N matches hidden states, and masked tokens where the checkpoint has their head",
        )
    if config.launch > 1:
        raise ConfigError("--launch: an encoder is distilled in one process", hint="leave it out")
    if "kl_share" in config.model_fields_set:
        raise ConfigError("--kl-share: of an encoder KL is taken at the masked tokens", hint="leave it out")


def _require_of_two_stacks(config: DistillConfig) -> None:
    refuse_settings(
        f"model {Path(config.model).name!r}",
        {
            **_of_next_tokens(config),
            "--launch": config.launch > 1,
            f"--method {config.method}": config.method not in ("keep-all", "drop", "width"),
            "--pack": config.pack is not None and config.method != "packed",
            "--wider": bool(config.wider),
            f"--choice {config.choice}": config.method == "drop" and config.choice != "uniform",
        },
        "make its package by --method width, drop or keep-all; --steps N goes on from there, in one process",
    )


def _of_next_tokens(config: DistillConfig) -> dict[str, bool]:
    """Of each setting that needs the scores of one decoder's next tokens: whether it is asked for."""
    return {
        "--public self": config.writes_itself,
        "--field-text": bool(config.field_text),
        "--refit-jacobian": config.method == "width" and config.refit_jacobian > 0,
        "--channels gradot": config.method == "width" and config.channels == "gradot",
        "--elevate": config.elevate > 0,
    }
