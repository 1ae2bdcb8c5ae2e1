"""``offsite tenant add|list|revoke``: the owner says who may ask its server."""

from __future__ import annotations

from dataclasses import asdict

from offsite.console import say, table
from offsite.staging import refuse_existing, staged_file
from server.tenants.config import TenantAddConfig, TenantListConfig, TenantRevokeConfig
from server.tenants.store import Tenants


def add_run(config: TenantAddConfig) -> dict[str, object]:
    """Carry out ``offsite tenant add``: the tenant is known by the hash of a fresh key, which is in a file.

    Raises:
        ConfigError: when there is a tenant of that name, or the output exists.
    """
    refuse_existing(config.output)
    limits = {"requests_at_once": config.requests_at_once, "tokens_per_day": config.tokens_per_day}
    with Tenants.open(config.tenants, create=True) as tenants:
        key = tenants.add(config.tenant, models=config.models, **limits)
        try:
            with staged_file(config.output) as stage:
                stage.touch(mode=0o600)
                stage.write_text(key + "\n", encoding="ascii")
        except BaseException:
            tenants.revoke(config.tenant)  # nobody has its key
            raise
    say(f"{config.tenant}: its key is in {config.output.name}, and nowhere else; hand it over safely")
    return {"tenant": config.tenant, "models": list(config.models), **limits}


def list_run(config: TenantListConfig) -> dict[str, object]:
    """Carry out ``offsite tenant list``: every tenant, its limits, and what it used."""
    with Tenants.open(config.tenants) as tenants:
        found = [(tenant, tenants.used(tenant.name)) for tenant in tenants.all()]
    rows = [
        [
            tenant.name,
            ", ".join(tenant.models) or "all",
            str(tenant.requests_at_once or "-"),
            str(tenant.tokens_per_day or "-"),
            str(used.num_requests),
            str(used.num_prompt_tokens),
            str(used.num_answer_tokens),
        ]
        for tenant, used in found
    ]
    table("tenants", ["name", "models", "at once", "tokens a day", "requests", "read", "written"], rows)
    return {"tenants": [{**asdict(tenant), "used": asdict(used)} for tenant, used in found]}


def revoke_run(config: TenantRevokeConfig) -> dict[str, object]:
    """Carry out ``offsite tenant revoke``: the tenant's key opens nothing any more."""
    with Tenants.open(config.tenants) as tenants:
        tenants.revoke(config.tenant)
    say(f"{config.tenant} is no tenant any more")
    return {"revoked": config.tenant}
