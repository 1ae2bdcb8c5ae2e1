"""Settings of ``offsite report privacy`` and ``offsite report verify``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from offsite.audits.config import PackageGates
from offsite.config import OUTPUT, POSITIONAL, REPEATED, USUAL, VerbConfig
from offsite.keys.config import IdentityConfig, KeysConfig


class PrivacyReportConfig(IdentityConfig, PackageGates):
    """Settings of ``offsite report privacy --audit AUDIT -o REPORT``."""

    verb: ClassVar[str] = "report privacy"

    audit: tuple[Path, ...] = Field(
        min_length=1,
        max_length=3,
        description="an audit folder; repeat it for audits of one bundle, of it plugged in, and of its package",
        json_schema_extra=REPEATED,
    )
    output: Path = Field(description="report folder to write", json_schema_extra=OUTPUT)
    release: Path | None = Field(
        None,
        description="what offsite seal wrote beside the sealed bundle, SEALED.release.json: on what it was let go",
        json_schema_extra=USUAL,
    )
    job: Path | None = Field(None, description="folder of the job that all of it belongs to", json_schema_extra=USUAL)
    format: Literal["html", "sacro", "board"] = Field(
        "html",
        description="html: the signed report's folder; sacro: with what output checkers of research environments load; "
        "board: with one page for a board; both hold the signed report in REPORT/report",
        json_schema_extra=USUAL,
    )
    scores: Path | None = Field(
        None,
        description="with --format sacro: what offsite audit bundle --keep-scores wrote",
        json_schema_extra=USUAL,
    )

    @model_validator(mode="after")
    def _scores_for_sacro(self) -> PrivacyReportConfig:
        if (self.format == "sacro") != (self.scores is not None):
            raise ValueError("--format sacro and --scores are given together or not at all")
        return self


class ReportFolder(VerbConfig):
    """Base of verbs that read a signed report."""

    report: Path = Field(description="a privacy report's folder", json_schema_extra=POSITIONAL)


class ReportVerifyConfig(KeysConfig, ReportFolder):
    """Settings of ``offsite report verify REPORT``."""

    verb: ClassVar[str] = "report verify"

    card: Path | None = Field(
        None,
        description="the issuer's card, for those who have no keys folder that pins it; needs --fingerprint",
        json_schema_extra=USUAL,
    )
    fingerprint: str | None = Field(
        None,
        description="with --card: the issuer's fingerprint, as told over another channel than the card came by",
        json_schema_extra=USUAL,
    )
    bundle: Path | None = Field(
        None, description="bundle folder that the report must be about", json_schema_extra=USUAL
    )
    package: Path | None = Field(
        None, description="package folder that the report must be about", json_schema_extra=USUAL
    )
    attestation_policy: Path | None = Field(
        None,
        description="policy that the report's attestation is held against: whose TPM, and the state of its machine",
        json_schema_extra=USUAL,
    )
    page: Path | None = Field(
        None, description="page to write once all checks passed: the report as HTML", json_schema_extra=USUAL
    )
    board: Path | None = Field(
        None,
        description="sheet to write once all checks passed: for a board, one page to print",
        json_schema_extra=USUAL,
    )

    @model_validator(mode="after")
    def _card_and_fingerprint(self) -> ReportVerifyConfig:
        if (self.card is None) != (self.fingerprint is None):
            raise ValueError("--card and --fingerprint are given together or not at all")
        return self


class ReportAttestConfig(IdentityConfig, ReportFolder):
    """Settings of ``offsite report attest REPORT``."""

    verb: ClassVar[str] = "report attest"

    quote: Path | None = Field(
        None,
        description="what the TPM attests, as tpm2_quote -m writes it; without it, the nonce that it must hold is told",
        json_schema_extra=USUAL,
    )
    quote_signature: Path | None = Field(
        None, description="its signature, as tpm2_quote -s writes it", json_schema_extra=USUAL
    )
    output: Path | None = Field(
        None, description="report folder to write, with the quote", json_schema_extra=OUTPUT | USUAL
    )

    @model_validator(mode="after")
    def _all_or_none(self) -> ReportAttestConfig:
        if len({self.quote is None, self.quote_signature is None, self.output is None}) > 1:
            raise ValueError("--quote, --quote-signature and -o are given together or not at all")
        return self
