"""The checks that an arriving bundle must pass, in order. No I/O: bytes, rows and tensors in, one type or an error out.

In this order:

1. *size* of the sealed manifest and its signatures, then the *signature* over the bytes as received, then *schema* and
   dates (`verify_sealed`);
2. *binding*: the job is known; parties, package, base model, round and dates are the job's (`bind`); nothing else holds
   the round and nothing newer has come (`check_unseen`, held against the registry); what the sealed files declare is no
   larger than the job's adapter (`verify_envelope`);
3. of the decrypted manifest: package, base model and adapter are the job's, and the *exact set of tensor names* with
   *shapes and dtypes* is that adapter's (`expected_tensors`);
4. of the tensors: names, shapes and dtypes again as they are in memory, *finite* values, and the *norms* of the
   effective update, and of a head, against the job's caps (`verify_adapter`).

`Verified` stands for all of it. ``server/plugging/fit.py`` takes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from adapters.heads import check_head
from adapters.kinds import declared
from adapters.norms import UpdateNorms, check_norms, update_norms
from offsite.artefacts.bundle import TENSOR_FILE, AdapterSpec, BundleManifest
from offsite.artefacts.job import Job
from offsite.artefacts.manifest import MANIFEST_NAME
from offsite.artefacts.owner import OwnerRecord
from offsite.errors import BadSchema, ConfigError, TooLarge, WrongBinding, WrongNames
from offsite.keys.identity import PublicKeys
from offsite.sealed.manifest import SealedManifest, bind, verify_sealed
from offsite.tensors import ADAPTER_HEADER_LIMIT_BYTES, TensorSpec, check_exact, check_finite, spec_of

BUNDLE_MANIFEST_LIMIT_BYTES = 4 * 2**20

_MAKING = object()


@dataclass(frozen=True)
class Verified:
    """An adapter that has passed every check, in the package's shapes. Only this module makes one.

    Attributes:
        what: names it in messages.
        tensors: by canonical name, on the CPU.
        job_id, client, round: None for a bundle of the owner's own making.
        norms: of the effective update by module; empty where they were not measured (see `verify_own` and `restored`).
    """

    what: str
    spec: AdapterSpec
    tensors: Mapping[str, Tensor] = field(repr=False)
    bundle_digest: str
    package_digest: str
    base_digest: str
    job_id: str | None
    client: str | None
    round: int | None
    norms: Mapping[str, UpdateNorms] = field(repr=False)
    made: object = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.made is not _MAKING:
            raise TypeError("a Verified is made by server/registry/verify.py alone")


def verify_envelope(
    manifest_raw: bytes,
    signatures_raw: bytes,
    keys: Callable[[str], PublicKeys],
    jobs: Callable[[str], Job],
    *,
    now: int,
) -> tuple[SealedManifest, Job]:
    """Return what a client signed about a sealed bundle, and the job it belongs to.

    Args:
        keys: gives the keys trusted under a fingerprint, or raises `Untrusted`.
        jobs: gives the job of an id, or raises `WrongBinding`.
        now: seconds since 1970.

    Raises:
        TooLarge, Untrusted, BadSignature, BadSchema, Expired: from `verify_sealed`.
        WrongBinding, WrongRecipient: when it is no bundle, or not one of that job.
        WrongNames: when its files are not a bundle's two.
    """
    manifest = verify_sealed(manifest_raw, signatures_raw, keys, now=now)
    if manifest.kind != "bundle":
        raise WrongBinding(f"this is a sealed {manifest.kind}, expected a bundle")
    job = jobs(manifest.job_id)
    bind(manifest, job)
    if [file.name for file in manifest.files] != sorted((MANIFEST_NAME, TENSOR_FILE)):
        raise WrongNames(
            f"a bundle holds exactly {TENSOR_FILE} and {MANIFEST_NAME}, this one {len(manifest.files)} files"
        )
    return manifest, job


def verify_sizes(manifest: SealedManifest, expected: Mapping[str, TensorSpec]) -> None:
    """Return only if no file is declared larger than the job's adapter can make it; nothing was decrypted yet.

    Raises:
        TooLarge: naming the file.
    """
    data = sum(spec.num_bytes for spec in expected.values())
    limits = {MANIFEST_NAME: BUNDLE_MANIFEST_LIMIT_BYTES, TENSOR_FILE: 8 + ADAPTER_HEADER_LIMIT_BYTES + data}
    for file in manifest.files:
        if file.bytes > limits[file.name]:
            raise TooLarge(f"{file.name!r} is said to hold {file.bytes} bytes, the job's adapter {limits[file.name]}")


def adapter_tensors(spec: AdapterSpec, record: OwnerRecord) -> dict[str, TensorSpec]:
    """Return the exact tensors that an adapter has on the record's package.

    Raises:
        BadSchema: when the package cannot carry it.
    """
    try:
        return declared(spec, record.layout, record.block_tensors)
    except ConfigError as error:
        raise BadSchema(str(error)) from None


def expected_tensors(
    what: str, manifest: BundleManifest, record: OwnerRecord, job: Job | None, round_digest: str | None = None
) -> dict[str, TensorSpec]:
    """Return the exact tensors that the bundle must hold, once its manifest declares just those.

    Args:
        job: None for a bundle of the owner's own making.
        round_digest: of the federation's round that it must answer; None when it must answer none.

    Raises:
        WrongBinding: when it was tuned on another package than the record's or the job's, or for another base model,
            or from other weights than the round's, or by another task than the job's, or holds another adapter than
            the job asks for.
        BadSchema: when its adapter is none that the package can carry.
        WrongNames, WrongShape: when it declares other tensors than that adapter's.
    """
    for name in ("package_digest", "base_digest"):
        found, stated = getattr(manifest, name), getattr(record, name)
        if found != stated:
            shown = "was tuned on package" if name == "package_digest" else "belongs to base model"
            raise WrongBinding(f"{what} {shown} {found[:19]}, not {stated[:19]}")
        if job is not None and getattr(job, name) != stated:
            raise WrongBinding(f"{what}: the job and the owner's record are of different packages")
    if manifest.round_digest != round_digest:
        found, wanted = (f"round {one[:19]}" if one else "no round" for one in (manifest.round_digest, round_digest))
        raise WrongBinding(f"{what} answers {found}, it was asked for {wanted}")
    if job is not None and manifest.task_digest != job.task_digest:
        found, wanted = (f"task {one[:19]}" if one else "no task" for one in (manifest.task_digest, job.task_digest))
        raise WrongBinding(f"{what} was tuned by {found}, its job carries {wanted}")
    if job is not None and manifest.adapter != job.adapter:
        changed = [key for key, value in manifest.adapter if value != getattr(job.adapter, key)]
        raise WrongBinding(f"{what} holds another adapter than its job asks for: {', '.join(changed)} differ")
    try:
        expected = adapter_tensors(manifest.adapter, record)
    except BadSchema as error:
        raise BadSchema(f"{what}: {error}") from None
    check_exact(what, manifest.tensors, expected)
    return expected


def verify_adapter(
    what: str,
    manifest: BundleManifest,
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    *,
    envelope: SealedManifest,
    job: Job,
    record: OwnerRecord,
    bundle_digest: str,
    round_digest: str | None = None,
) -> Verified:
    """Return the adapter that a client handed in, once nothing is left to check.

    Args:
        tensors: as read from the decrypted file.
        base: the package's own tensors of the modules that the adapter changes, by canonical name; of whole blocks in a
            federation's round, with what earlier rounds added.
        envelope: what `verify_envelope` returned for it, with its job.
        bundle_digest: of the decrypted manifest's bytes.
        round_digest: as for `expected_tensors`.

    Raises:
        WrongBinding, BadSchema, WrongNames, WrongShape: as `expected_tensors`.
        NotFinite: when a value, or the update made of them, is not finite.
        NormTooLarge: when a module's effective update, or a head, is over the job's caps.
    """
    expected = expected_tensors(what, manifest, record, job, round_digest)
    _check_tensors(what, tensors, expected)
    check_head(tensors, max_head_norm=job.policy.max_head_norm)
    norms = update_norms(manifest.adapter, tensors, base)
    check_norms(
        norms,
        max_relative_frobenius=job.policy.max_relative_frobenius,
        max_relative_spectral=job.policy.max_relative_spectral,
    )
    return _made(what, manifest, tensors, bundle_digest, norms, (job.job_id, job.client, envelope.round))


def restored(
    what: str,
    manifest: BundleManifest,
    tensors: Mapping[str, Tensor],
    *,
    job: Job,
    record: OwnerRecord,
    round_number: int,
    bundle_digest: str,
    round_digest: str | None = None,
) -> Verified:
    """Return the adapter of files whose digests are those that the registry wrote down when it verified them.

    That they are is for the caller to know: it has hashed the very bytes that it gives. The norms are not measured
    again, because the same bytes have the same.

    Raises:
        WrongBinding, BadSchema, WrongNames, WrongShape, NotFinite: when it does not fit the record any longer.
    """
    _check_tensors(what, tensors, expected_tensors(what, manifest, record, job, round_digest))
    return _made(what, manifest, tensors, bundle_digest, {}, (job.job_id, job.client, round_number))


def verify_own(
    what: str, manifest: BundleManifest, tensors: Mapping[str, Tensor], record: OwnerRecord, *, bundle_digest: str
) -> Verified:
    """Return the adapter of a bundle that the owner tuned itself: a reference to compare with, or a trial.

    Never for what came from a client: there is no job, no signature and no cap on norms here.

    Raises:
        WrongBinding, BadSchema, WrongNames, WrongShape, NotFinite: when it is not sound, or of another package.
    """
    _check_tensors(what, tensors, expected_tensors(what, manifest, record, None))
    return _made(what, manifest, tensors, bundle_digest, {}, (None, None, None))


def _check_tensors(what: str, tensors: Mapping[str, Tensor], expected: Mapping[str, TensorSpec]) -> None:
    check_exact(what, {name: spec_of(tensor) for name, tensor in tensors.items()}, expected)
    check_finite(what, tensors)


def _made(
    what: str,
    manifest: BundleManifest,
    tensors: Mapping[str, Tensor],
    bundle_digest: str,
    norms: Mapping[str, UpdateNorms],
    slot: tuple[str | None, str | None, int | None],
) -> Verified:
    job_id, client, number = slot
    return Verified(
        what=what,
        spec=manifest.adapter,
        tensors=dict(tensors),
        bundle_digest=bundle_digest,
        package_digest=manifest.package_digest,
        base_digest=manifest.base_digest,
        job_id=job_id,
        client=client,
        round=number,
        norms=norms,
        made=_MAKING,
    )
