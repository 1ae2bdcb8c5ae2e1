"""What tests of both sides share: a small tokenizer, a tiny full model, packages of it, and a way to tamper."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from offsite.blocks import block_list, decoder_stack, find_mlp, slice_mlp
from offsite.digests import model_digest
from offsite.owner import OwnerRecord, write_owner_record
from offsite.package import Method, Package, describe_layout, write_package
from offsite.split import extract
from offsite.tensors import read_header

# A test that reaches for a hub fails at once, here and in what it spawns.
huggingface_hub.constants.HF_HUB_OFFLINE = True
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def letters_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer of single bytes, 259 tokens, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    return tokenizer


@pytest.fixture(scope="session")
def full_llama() -> LlamaForCausalLM:
    """A random llama of eight blocks whose every block matters; tied head; read only."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return model.eval()


PackageMaker = Callable[..., Package]


@pytest.fixture(scope="session")
def make_package(full_llama: LlamaForCausalLM, letters_tokenizer: PreTrainedTokenizerFast) -> PackageMaker:
    """Write a package of a model, and its owner's record: whole blocks by `kept`, MLP channels by `channels`."""

    def make(
        out: Path,
        *,
        model: PreTrainedModel | None = None,
        kept: tuple[int, ...] = (0, 1, 2, 4, 5, 6, 7),
        channels: dict[str, tuple[int, ...]] | None = None,
        ends: tuple[int, int] = (2, 2),
        dtype: str = "float32",
        **changes: Any,
    ) -> Package:
        full = full_llama if model is None else model
        stack = decoder_stack(full)
        emulator = extract(full, {stack.name: kept})
        blocks = block_list(emulator, decoder_stack(emulator))
        for name, numbers in (channels or {}).items():
            block = blocks[ends[0] + int(name.split(".")[1])]
            slice_mlp(block, find_mlp(block), torch.tensor(numbers))
        whole = not channels and len(kept) == stack.num_blocks
        inner = _linears(blocks[ends[0]]) if channels or whole else ()
        layout = describe_layout(
            emulator, num_bottom=ends[0], num_top=ends[1], adaptable_middle=inner, middle_whole=whole
        )
        settings: dict[str, Any] = {
            "base_digest": model_digest(full),
            "method": Method(name="width" if channels else "drop"),
            "figures": {"kl": 0.5},
            "licence": "Apache-2.0",
        }
        package = write_package(
            out, model=emulator, tokenizer=letters_tokenizer, layout=layout, dtype=dtype, **{**settings, **changes}
        )
        record = OwnerRecord(
            package_digest=package.digest,
            base_digest=package.manifest.base_digest,
            layout=package.layout,
            block_tensors=package.block_tensors(),
            num_blocks=stack.num_blocks,
            kept=kept,
            channels=channels or {},
        )
        write_owner_record(out, record)
        return package

    return make


def _linears(block: torch.nn.Module) -> tuple[str, ...]:
    from offsite.blocks import linear_names

    return linear_names(block)


@pytest.fixture(scope="session")
def dropped_package(tmp_path_factory: pytest.TempPathFactory, make_package: PackageMaker) -> Package:
    """A package without the full model's block 3; read only."""
    return make_package(tmp_path_factory.mktemp("dropped") / "package")


@pytest.fixture(scope="session")
def narrow_channels() -> dict[str, tuple[int, ...]]:
    """The channels that `narrow_package` keeps, another set and number in each block."""
    return {f"middle.{number}": tuple(range(number, 48, 3 + number % 2)) for number in range(4)}


@pytest.fixture(scope="session")
def narrow_package(
    tmp_path_factory: pytest.TempPathFactory, make_package: PackageMaker, narrow_channels: dict[str, tuple[int, ...]]
) -> Package:
    """A package with every block and some of the middle's MLP channels; read only."""
    out = tmp_path_factory.mktemp("narrow") / "package"
    return make_package(out, kept=tuple(range(8)), channels=narrow_channels)


@pytest.fixture(scope="session")
def whole_package(tmp_path_factory: pytest.TempPathFactory, make_package: PackageMaker) -> Package:
    """A package that keeps everything; read only."""
    return make_package(tmp_path_factory.mktemp("whole") / "package", kept=tuple(range(8)))


@pytest.fixture
def tamper(tmp_path: Path) -> Callable[..., Path]:
    """Copy an artefact, let `change` edit the copy, then bind every file anew and let `edit` change the manifest.

    With `redeclare` the manifest declares whatever tensors the copy's files now hold.
    """

    def tampered(
        artefact: Path,
        *,
        change: Callable[[Path], None] | None = None,
        edit: Callable[[dict[str, Any]], None] | None = None,
        redeclare: bool = False,
    ) -> Path:
        copy = tmp_path / "tampered"
        shutil.copytree(artefact, copy)
        if change is not None:
            change(copy)
        manifest = json.loads((copy / "offsite.json").read_text())
        for name in manifest["files"]:
            path = copy / name
            if path.is_file() and not path.is_symlink():
                digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
                manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": digest}
        if redeclare:
            found = [read_header(path) for path in copy.glob("*.safetensors")]
            manifest["tensors"] = {name: spec.model_dump() for specs in found for name, spec in specs.items()}
        if edit is not None:
            edit(manifest)
        (copy / "offsite.json").write_text(json.dumps(manifest))
        return copy

    return tampered
