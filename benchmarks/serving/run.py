"""Tokens per second and memory of one model that serves many adapters, against one request at a time.

    python benchmarks/serving/run.py -o benchmarks/serving/results/NAME.json

Arms take turns, each in a process of its own, and the whole round is repeated; ratios are taken within a round. An arm
asks the engine that ``offsite serve`` runs, without HTTP between, so that no client competes for the processor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ARMS = ("one-at-a-time", "one-tenant", "all-tenants", "no-adapter")
"""Today's build with an adapter plugged in; one batch of one adapter, of as many adapters as requests, and of none."""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("-o", "--out", type=Path, required=True)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--requests", type=int, default=16)
    options.add_argument("--prompt-tokens", type=int, default=32)
    options.add_argument("--answer-tokens", type=int, default=32)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--blocks", default="all", help="blocks that carry LoRA on every linear: all, or 2+2")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--arm", choices=ARMS, help="carry out one arm and print its figures")
    given = options.parse_args()
    if given.arm:
        print(json.dumps(arm(given)))
        return 0
    from benchmarks.record import environment, write

    config = {name: value for name, value in vars(given).items() if name not in ("out", "arm")}
    rounds = [{name: measured(name, given) for name in ARMS} for _ in range(given.rounds)]
    result = {
        "config": config,
        "environment": {**environment(), "load": os.getloadavg(), "cpus": os.cpu_count()},
        "rounds": rounds,
        "ratios": ratios(rounds),
    }
    write(given.out, result)
    print(json.dumps(result["ratios"], indent=1))
    return 0


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one arm, from a process of its own."""
    words = [sys.executable, __file__, "--arm", name, "-o", str(given.out)]
    for option in ("model", "requests", "prompt_tokens", "answer_tokens", "rank", "blocks", "threads"):
        words += [f"--{option.replace('_', '-')}", str(getattr(given, option))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(name, json.dumps(found), file=sys.stderr, flush=True)
    return found


def ratios(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over rounds of what the targets are about, and each round's."""

    def of(measure: Any) -> dict[str, Any]:
        found = [measure(one) for one in rounds]
        return {"median": statistics.median(found), "rounds": found}

    def speed(one: dict[str, Any], over: str, under: str) -> float:
        return float(one[over]["tokens_per_second"] / one[under]["tokens_per_second"])

    def memory(one: dict[str, Any]) -> float:
        alone = one["one-at-a-time"]["resident_bytes"] - one["one-at-a-time"]["adapter_bytes"]
        return float(one["all-tenants"]["resident_bytes"] / (alone + one["all-tenants"]["adapter_bytes"]))

    return {
        "together_over_one_at_a_time": of(lambda one: speed(one, "all-tenants", "one-at-a-time")),
        "one_tenant_over_one_at_a_time": of(lambda one: speed(one, "one-tenant", "one-at-a-time")),
        "all_tenants_over_one_tenant": of(lambda one: speed(one, "all-tenants", "one-tenant")),
        "resident_over_model_and_adapters": of(memory),
    }


def arm(given: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second, the resident set after the answers, and the adapters' bytes."""
    import torch

    from offsite.generation.sampling import Settings
    from offsite.modelling.load import load_model, load_tokenizer
    from server.plugging.fit import plain_model, plug
    from server.serving.engine import Engine
    from server.serving.jobs import Job

    torch.set_num_threads(given.threads)
    model, tokenizer = load_model(given.model, dtype="float32"), load_tokenizer(given.model)
    model.requires_grad_(False)
    num_adapters = {"one-at-a-time": 1, "one-tenant": given.requests, "all-tenants": given.requests}.get(given.arm, 0)
    alone = given.arm == "one-at-a-time"
    adapter_bytes = 0
    if alone:
        adapter = drawn(model, 0, given)
        adapter_bytes = sum(4 * tensor.numel() for tensor in adapter.tensors.values())
        model = plain_model(plug(model, adapter))
        del adapter
    engine = Engine(model, tokenizer, limit_rows=1 if alone else given.requests, limit_waiting=given.requests)
    put = [None if alone else engine.rows.put_on(drawn(model, seed, given)) for seed in range(num_adapters)]
    adapter_bytes += sum(one.num_bytes for one in put if one is not None)
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    prompts = torch.randint(size, (given.requests, given.prompt_tokens), generator=generator).tolist()
    chosen = {"one-tenant": [put[0]] * given.requests if put else [], "all-tenants": put}.get(
        given.arm, [None] * given.requests
    )

    def job(number: int, num_tokens: int) -> Job:
        settings = Settings(limit_tokens=num_tokens, temperature=0.0)
        return Job((tuple(prompts[number]),), (settings,), frozenset(), True, chosen[number], str(number))

    async def here() -> bool:
        return False

    async def one(number: int, num_tokens: int) -> int:
        async with aclosing(engine.answer(job(number, num_tokens), here)) as pieces:
            return len([piece async for _, piece in pieces])

    async def all_of_them(num_requests: int, num_tokens: int) -> int:
        return sum(await asyncio.gather(*(one(number, num_tokens) for number in range(num_requests))))

    async def timed() -> tuple[int, float, float]:
        await all_of_them(2, 2)  # what is loaded and allocated once
        began, used = time.monotonic(), time.process_time()
        num_tokens = await all_of_them(given.requests, given.answer_tokens)
        return num_tokens, time.monotonic() - began, time.process_time() - used

    num_tokens, seconds, cpu_seconds = asyncio.run(timed())
    return {
        "tokens_per_second": num_tokens / seconds,
        "num_tokens": num_tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "resident_bytes": resident_bytes(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "adapter_bytes": adapter_bytes,
        "model_bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
    }


def drawn(model: Any, seed: int, given: argparse.Namespace) -> Any:
    """Return a LoRA adapter on every linear of the blocks, as small as training makes one."""
    import torch

    from offsite.artefacts.bundle import AdapterSpec
    from offsite.modelling.blocks import block_list, decoder_stack, linear_dims, linear_names
    from server.plugging.fit import Fitted

    generator = torch.Generator().manual_seed(seed)
    stack = decoder_stack(model)
    numbers = range(stack.num_blocks)
    if given.blocks != "all":
        bottom, top = map(int, given.blocks.split("+"))
        numbers = [*range(bottom), *range(stack.num_blocks - top, stack.num_blocks)]
    sites, tensors = {}, {}
    for number in numbers:
        sites[f"bottom.{number}"] = f"{stack.name}.{number}"
        block = block_list(model, stack)[number]
        for name in linear_names(block):
            inputs, outputs = linear_dims(block.get_submodule(name))
            tensors[f"bottom.{number}.{name}.lora_A"] = 0.02 * torch.randn(given.rank, inputs, generator=generator)
            tensors[f"bottom.{number}.{name}.lora_B"] = 0.02 * torch.randn(outputs, given.rank, generator=generator)
    spec = AdapterSpec(kind="lora", placement="all", rank=given.rank, alpha=2.0 * given.rank, dtype="float32")
    return Fitted(spec, tensors, sites)


def resident_bytes() -> int:
    """Return the resident set of this process as it is now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
