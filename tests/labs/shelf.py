"""A registry with bundles of several clients on it, for tests of what is done with accepted ones."""

from __future__ import annotations

import secrets
import shutil
from types import SimpleNamespace

from offsite.artefacts.bundle import open_bundle
from offsite.artefacts.job import Job
from server.registry.registry import Registry
from server.registry.rows import short_id


class Shelf:
    """A registry of several clients' bundles, put there without sealing them."""

    def __init__(self, folder, package, make_bundle):
        self.folder, self.package, self._make = folder, package, make_bundle
        self.keys = folder / "keys"
        self.keys.mkdir(mode=0o700)
        self.registry = Registry.open(folder / "registry", self.keys, create=True)
        self.bundles, self._sequence = {}, 0

    def put(self, client, name, *, base_digest=None, accept=True, **spec):
        """Return the id of a new bundle of the client (one letter), which calls itself `name`."""
        self._sequence += 1
        bundle = self._make(
            self.folder / f"bundle-{self._sequence}", self.package, seed=self._sequence, shake=0.3, **spec
        )
        manifest = open_bundle(bundle.path).manifest
        bound = {"package_digest": manifest.package_digest, "base_digest": base_digest or manifest.base_digest}
        parties = {"owner": "-".join(["a" * 4] * 13), "client": "-".join([client * 4] * 13)}
        job = Job(job_id=secrets.token_hex(16), adapter=manifest.adapter, created=1, expires=2**39, **parties, **bound)
        digest = "sha256:" + secrets.token_hex(32)
        self.registry.add_job(job, package=self.package.path, client_name=name, now=self._sequence)
        envelope = SimpleNamespace(job_id=job.job_id, issuer=job.client, round=1, sequence=self._sequence)
        self.registry.receive(envelope, digest, now=self._sequence)
        shutil.copytree(bundle.path, self.registry.bundle_folder(short_id(digest)))
        tensors = manifest.files["adapter.safetensors"].sha256
        self.registry.verified(digest, bundle_digest=bundle.digest, tensors_sha256=tensors, figures={})
        self.bundles[short_id(digest)] = bundle
        if accept:
            self.registry.advance(short_id(digest), "accepted")
        return short_id(digest)
