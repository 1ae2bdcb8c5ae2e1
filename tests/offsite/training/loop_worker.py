"""A training run as a process of its own, for the tests that kill it or run two of it.

A frozen full model teaches an emulator whose ends are frozen too, as `offsite distill` does.
Usage: python loop_worker.py '{"work": PATH, "out": PATH, "resume": false, ...}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from offsite.training.config import LoopConfig
from offsite.training.loop import train
from offsite.training.processes import full_state, is_launched, world


class Pair(nn.Module):
    """The full model and its emulator; the forward is the distillation loss, summed, and its count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        config = LlamaConfig(**sizes, num_hidden_layers=4, num_key_value_heads=2, tie_word_embeddings=True)
        self.full = LlamaForCausalLM(config).eval().requires_grad_(False)
        self.emulator = LlamaForCausalLM(config).eval().requires_grad_(False)
        self.trained = [self.emulator.model.layers[1], self.emulator.model.layers[2]]
        for block in self.trained:
            block.requires_grad_(True)

    def forward(self, input_ids: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            want = self.full(input_ids).logits
        errors = functional.mse_loss(self.emulator(input_ids).logits, want, reduction="none").mean(-1)
        return (errors * counted).sum(), counted.sum()


class Rows:
    """Four rows of random tokens a step; rows count different numbers of positions."""

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        input_ids = torch.randint(0, 97, (4, 8), generator=generator)
        counted = torch.arange(8)[None, :] < torch.tensor([8, 5, 2, 7])[:, None]
        return {"input_ids": input_ids, "counted": counted.float()}


def main(given: dict[str, object]) -> None:
    pair, rows, processes = Pair(), Rows(), world()
    names = [name for name, parameter in pair.named_parameters() if parameter.requires_grad]
    whole_numel = sum(parameter.numel() for parameter in pair.parameters())
    calls = 0

    def step_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == given.get("kill_at_call"):
            os.kill(os.getpid(), signal.SIGKILL)
        return model(**batch)

    def evaluate() -> float:
        with torch.no_grad():
            total, count = pair(**rows.batch(1000))
        return float(total / count)

    config = LoopConfig(
        steps=int(given.get("steps", 12)), learning_rate=1e-2, precision="fp32", weight_decay=0.1, clip_norm=0.05,
        checkpoint_every=3, evaluate_every=2, accumulate=int(given.get("accumulate", 1)),
    )  # fmt: skip
    if given.get("disagree"):
        with torch.no_grad():
            pair.trained[0].mlp.up_proj.weight += processes.rank
    outcome = train(
        pair, {name: dict(pair.named_parameters())[name] for name in names}, rows, step_loss, config,
        work=Path(str(given["work"])), resume=bool(given.get("resume")), evaluate=evaluate, label="test",
        shard_blocks=[*pair.full.model.layers, *pair.emulator.model.layers],
    )  # fmt: skip
    local = [p.to_local() if hasattr(p, "to_local") else p for p in pair.parameters()]
    facts = {
        **outcome.figures(),
        "launched": is_launched(),
        "types": sorted({type(p.data).__name__ for p in pair.parameters()}),
        "local_share": sum(tensor.numel() for tensor in local) / whole_numel,
    }
    frozen = full_state(pair, ["emulator.model.embed_tokens.weight"], processes)
    out = Path(str(given["out"]))
    out.mkdir(exist_ok=True)
    if processes.is_main:
        save_file({**outcome.tensors, **frozen}, out / "tensors.safetensors")
    (out / f"facts-{processes.rank}.json").write_text(json.dumps({**facts, "num_tensors": len(outcome.tensors)}))


if __name__ == "__main__":
    from offsite.errors import OffsiteError

    try:
        main(json.loads(sys.argv[1]))
    except OffsiteError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
