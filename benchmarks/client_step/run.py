"""What one client step costs: full fine-tuning, LoRA on the full model, offsite with whole ends, offsite with LoRA.

Run as: ``python benchmarks/client_step/run.py --model smollm2-135m -o benchmarks/client_step/results/NAME.json``.
Every arm trains on the same batches in a process of its own, one after another, the whole round repeated; figures are
tokens/s and peak memory as ratios to LoRA on the full model within the round. ``--shape`` uses random weights of a
published shape instead of a model (a GPU is wanted for those).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.record import environment

ARMS = {
    "full": {"package": "keep-all", "kind": "blocks", "placement": "all"},
    "lora_full": {"package": "keep-all", "kind": "lora", "placement": "all"},
    "offsite_ends": {"package": "emulator", "kind": "blocks", "placement": "2+2"},
    "offsite_lora": {"package": "emulator", "kind": "lora", "placement": "2+2"},
}
SHAPES: dict[str, dict[str, Any]] = {
    "opt-1.3b": {
        "model_type": "opt",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "ffn_dim": 8192,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 2048,
    },
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
}


def main() -> None:
    """Measure every arm in rounds and write the ratios."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--shape", choices=sorted(SHAPES), default=None)
    options.add_argument("--method", nargs="*", default=["width=0.33"], help="settings of the emulator, as key=value")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--steps", type=int, default=4, help="timed steps per arm and round, after one that is not")
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--block-tokens", type=int, default=256)
    options.add_argument("--arm", default=None, help=argparse.SUPPRESS)
    options.add_argument("--package", type=Path, default=None, help=argparse.SUPPRESS)
    options.add_argument("-o", "--out", type=Path, default=None)
    given = options.parse_args()
    if given.arm:
        print(json.dumps(_measure(given)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rounds = _rounds(given, Path(folder))
    arms = {arm: _against(rounds, arm) for arm in ARMS}
    settings = {key: value for key, value in vars(given).items() if key not in {"arm", "package", "out"}}
    result = {
        "benchmark": "client_step",
        **environment(),
        "config": settings,
        "seed": 0,
        "arms": arms,
        "rounds": rounds,
    }
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("| arm | trained parameters | tokens/s, of LoRA on the full model | peak memory, of the same |")
    print("| --- | --- | --- | --- |")
    for arm, found in arms.items():
        speed, memory = found["tokens_per_second_ratio"], found["peak_bytes_ratio"]
        print(f"| {arm} | {found['trained']:,} | {speed:.2f} | {memory:.2f} |")


def _rounds(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    model = _random_model(given.shape, folder) if given.shape else given.model
    for name, words in {"keep-all": ["--method", "keep-all"], "emulator": _method(given.method)}.items():
        command = [
            sys.executable,
            "-P",
            "-m",
            "offsite",
            "distill",
            model,
            "--steps",
            "0",
            "-o",
            str(folder / name),
            *words,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = []
    for number in range(given.rounds):
        one = {}
        for arm, spec in ARMS.items():
            words = ["--arm", arm, "--package", str(folder / spec["package"]), "--steps", str(given.steps)]
            words += ["--batch-size", str(given.batch_size), "--block-tokens", str(given.block_tokens)]
            done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
            one[arm] = json.loads(done.stdout.splitlines()[-1])
            print(f"round {number}: {arm} {one[arm]}", file=sys.stderr, flush=True)
        found.append(one)
    return found


def _method(words: list[str]) -> list[str]:
    public = Path(__file__).resolve().parents[2] / "offsite" / "data" / "public.jsonl.gz"
    flags = [part for word in words for part in (f"--{word.partition('=')[0]}", word.partition("=")[2])]
    return ["--method", words[0].partition("=")[0].replace("blocks", "drop"), "--public", str(public), *flags]


def _random_model(shape: str, folder: Path) -> str:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    settings = dict(SHAPES[shape])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    model.to(torch.bfloat16).save_pretrained(folder / shape)
    from offsite.modelling.fetch import fetch

    AutoTokenizer.from_pretrained(fetch("smollm2-135m")).save_pretrained(folder / shape)
    return str(folder / shape)


def _measure(given: argparse.Namespace) -> dict[str, Any]:
    """Train one arm for some steps and return tokens/s of the timed ones and the process's peak memory in bytes."""
    import torch

    from client.objectives.tokens import next_token_loss
    from client.tuning.tune import attach_to_package
    from offsite.artefacts.bundle import AdapterSpec
    from offsite.artefacts.package import open_package
    from offsite.training.devices import choose_device
    from offsite.training.loop import peak_bytes
    from offsite.training.step import uses_bf16

    spec = AdapterSpec(kind=ARMS[given.arm]["kind"], placement=ARMS[given.arm]["placement"])
    device = choose_device()
    attached = attach_to_package(open_package(given.package), spec, device=device)
    parameters = list(attached.trainable.values())
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    attached.model.train()
    seconds = 0.0
    for step in range(given.steps + 1):
        ids = torch.randint(0, 1000, (given.batch_size, given.block_tokens), generator=generator)
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16("auto", device)):
            loss, count = next_token_loss(attached.model, batch)
        (loss / count).backward()
        optimiser.step()
        optimiser.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began if step else 0.0
    tokens = given.steps * given.batch_size * given.block_tokens
    trained = sum(parameter.numel() for parameter in parameters)
    return {"tokens_per_second": tokens / seconds, "peak_bytes": peak_bytes(device), "trained": trained}


def _against(rounds: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    def ratio(key: str) -> float:
        return median(one[arm][key] / one["lora_full"][key] for one in rounds)

    found = {f"{key}_ratio": ratio(key) for key in ("tokens_per_second", "peak_bytes")}
    return {"trained": rounds[0][arm]["trained"], **found}


if __name__ == "__main__":
    main()
