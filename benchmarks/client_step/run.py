"""What one client step costs, against LoRA on the full model by peft and transformers' Trainer.

Run as: ``python benchmarks/client_step/run.py --model smollm2-135m -o benchmarks/client_step/results/NAME.json``.
Every arm trains on the same batches in a process of its own, one after another, the whole round repeated; figures are
tokens/s (on the wall, and per second of the processor, which other programs do not lengthen) and peak memory as ratios
to the peer within the round. ``--shape`` uses random weights of a published shape
instead of a model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.record import environment

PEER = "peft_trainer"
ARMS = {
    PEER: {"package": "model", "kind": "lora", "placement": "all"},
    "offsite_all": {"package": "emulator", "kind": "lora", "placement": "all"},
    "offsite_top": {"package": "emulator", "kind": "lora", "placement": "0+2"},
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
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}


class Clocks(NamedTuple):
    """Seconds on the wall, and of the processor, which other programs do not lengthen."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> Clocks:
        """Return what both show."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, earlier: Clocks) -> Clocks:
        """Return the difference."""
        return Clocks(self.wall - earlier.wall, self.processor - earlier.processor)

    def until_now(self) -> Clocks:
        """Return what has gone by."""
        return Clocks.now().since(self)


def _rates(tokens: int, taken: list[Clocks]) -> dict[str, float]:
    wall, processor = (sum(one[place] for one in taken) for place in (0, 1))
    return {"tokens_per_second": tokens / wall, "tokens_per_processor_second": tokens / processor}


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
    options.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), help="the peer is always run")
    options.add_argument("--threads", type=int, default=0, help="of each arm's process; 0: as many as there are cores")
    options.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of every arm")
    options.add_argument("--emulator", default=None, help="package made before with --method, to save making it")
    options.add_argument("--note", default="", help="what the run competed with, for the record")
    options.add_argument("--arm", default=None, help=argparse.SUPPRESS)
    options.add_argument("--package", type=Path, default=None, help=argparse.SUPPRESS)
    options.add_argument("-o", "--out", type=Path, default=None)
    given = options.parse_args()
    if given.arm:
        print(json.dumps(_measure(given)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rounds = _rounds(given, Path(folder))
    arms = {arm: _against(rounds, arm) for arm in rounds[0]}
    settings = {key: value for key, value in vars(given).items() if key not in {"arm", "package", "emulator", "out"}}
    result = {
        "benchmark": "client_step",
        **environment(),
        "config": settings,
        "seed": 0,
        "peer": PEER,
        "arms": arms,
        "rounds": rounds,
    }
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("| arm | trained parameters | tokens/s, of the peer's | per processor second | peak memory, of the peer's |")
    print("| --- | --- | --- | --- | --- |")
    for arm, found in arms.items():
        speed, memory = found["tokens_per_second_ratio"], found["peak_bytes_ratio"]
        own = found["tokens_per_processor_second_ratio"]
        print(f"| {arm} | {found['trained']:,} | {speed:.2f} | {own:.2f} | {memory:.2f} |")


def _rounds(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    model = _random_model(given.shape, folder) if given.shape else given.model
    arms = [PEER, *(arm for arm in given.arms if arm != PEER)]
    if given.emulator:
        (folder / "emulator").symlink_to(Path(given.emulator).resolve(), target_is_directory=True)
    made = {"keep-all": ["--method", "keep-all"], "emulator": _method(given.method)}
    for name, words in made.items():
        if all(ARMS[arm]["package"] != name for arm in arms) or (folder / name).exists():
            continue
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
        for arm in arms:
            package = folder / ARMS[arm]["package"]
            words = ["--arm", arm, "--package", str(package), "--model", model, "--steps", str(given.steps)]
            words += ["--batch-size", str(given.batch_size), "--block-tokens", str(given.block_tokens)]
            words += ["--precision", given.precision]
            threads = {"OMP_NUM_THREADS": str(given.threads)} if given.threads else {}
            done = subprocess.run(
                [sys.executable, __file__, *words],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **threads},
            )
            for name, figures in json.loads(done.stdout.splitlines()[-1]).items():
                one[name] = figures
                print(f"round {number}: {name} {figures}", file=sys.stderr, flush=True)
        found.append(one)
    return found


def _method(words: list[str]) -> list[str]:
    public = Path(__file__).resolve().parents[2] / "offsite" / "data" / "public.jsonl.gz"
    flags = [part for word in words for part in (f"--{word.partition('=')[0]}", word.partition("=")[2])]
    flags += ["--calibration-tokens", "1024", "--evaluation-tokens", "512"]  # of no weight for what a step costs
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


def _measure(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train one arm for some steps; return, by name, tokens/s of the timed ones and the peak memory in bytes so far."""
    if given.arm == PEER:
        return {given.arm: _peer(given)}
    import torch

    from adapters.held import hold_frozen
    from adapters.shared import share_products
    from client.objectives.tokens import next_token_loss
    from client.tuning.hidden import kept_states
    from client.tuning.tune import attach_to_package
    from offsite.artefacts.bundle import AdapterSpec
    from offsite.artefacts.package import open_package
    from offsite.text.batches import Example, collate
    from offsite.training.devices import choose_device
    from offsite.training.loop import peak_bytes
    from offsite.training.precision import uses_bf16

    spec = AdapterSpec(kind=ARMS[given.arm]["kind"], placement=ARMS[given.arm]["placement"])
    device = choose_device()
    attached = attach_to_package(open_package(given.package), spec, device=device)
    share_products(attached)
    is_bf16 = uses_bf16(given.precision, device)
    if is_bf16:
        hold_frozen(attached)
    parameters = list(attached.trainable.values())
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    attached.model.train()
    rows = [Example(row, row) for row in _rows(given)]

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16, cache_enabled=False)

    def step(number: int) -> Clocks:
        began = Clocks.now()
        some = rows[number * given.batch_size : (number + 1) * given.batch_size]
        batch = {name: tensor.to(device) for name, tensor in collate(some, 0).items()}
        with autocast():
            loss, count = next_token_loss(attached.model, batch)
        (loss / count).backward()
        optimiser.step()
        optimiser.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return began.until_now()

    def figures(taken: list[Clocks], num_steps: int) -> dict[str, Any]:
        tokens = num_steps * given.batch_size * given.block_tokens
        trained = sum(parameter.numel() for parameter in parameters)
        return {**_rates(tokens, taken), "peak_bytes": peak_bytes(device), "trained": trained, "bf16": is_bf16}

    if not given.arm.endswith("_top"):
        step(0)
        return {given.arm: figures([step(number) for number in range(1, given.steps + 1)], given.steps)}
    with tempfile.TemporaryDirectory() as folder:
        began = Clocks.now()
        kept = kept_states(
            attached,
            rows,
            pad_id=0,
            folder=Path(folder) / "hidden",
            limit_bytes=1 << 33,
            binding={},
            autocast=autocast,
        )
        with kept as done:
            if done is None:
                raise RuntimeError("nothing was kept")
            filling = began.until_now()
            epochs = [[step(number) for number in range(given.steps + 1)] for _ in range(2)]
    whole = given.steps + 1
    return {
        f"{given.arm}_first_epoch": figures([filling, *epochs[0]], whole),
        f"{given.arm}_later_epochs": figures(epochs[1], whole),
    }


def _rows(given: argparse.Namespace) -> list[list[int]]:
    """Return the rows of all steps, the first of which is not timed."""
    import torch

    generator = torch.Generator().manual_seed(0)
    num_rows = (given.steps + 1) * given.batch_size
    found: list[list[int]] = torch.randint(0, 1000, (num_rows, given.block_tokens), generator=generator).tolist()
    return found


def _peer(given: argparse.Namespace) -> dict[str, Any]:
    """Train LoRA on every linear layer of the full model's blocks, as peft and transformers do it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from offsite.modelling.fetch import fetch
    from offsite.training.devices import choose_device
    from offsite.training.loop import peak_bytes
    from offsite.training.precision import uses_bf16

    device = choose_device()
    path = given.model if Path(given.model).is_dir() else fetch(given.model)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    is_bf16 = uses_bf16(given.precision, device)
    ends: list[Clocks] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(Clocks.now())

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: object) -> Any:
            return torch.utils.data.SequentialSampler(rows)  # type: ignore[arg-type]

    rows = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in _rows(given)]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=given.batch_size,
            max_steps=given.steps + 1,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            bf16=is_bf16,
            use_cpu=device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        InOrder(model=model, args=settings, train_dataset=rows, callbacks=[Clock()]).train()
    tokens = given.steps * given.batch_size * given.block_tokens
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        **_rates(tokens, [ends[-1].since(ends[0])]),
        "peak_bytes": peak_bytes(device),
        "trained": trained,
        "bf16": is_bf16,
    }


def _against(rounds: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    def ratio(key: str) -> float:
        return median(one[arm][key] / one[PEER][key] for one in rounds)

    found = {f"{key}_ratio": ratio(key) for key in ("tokens_per_second", "tokens_per_processor_second", "peak_bytes")}
    return {"trained": rounds[0][arm]["trained"], **found}


if __name__ == "__main__":
    main()
