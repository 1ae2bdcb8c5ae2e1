#!/usr/bin/env bash
# transformers: a GGUF model that was unpacked because it could not stay packed is dense, and refuses to be saved.
#
# Seen with transformers 5.23.0, gguf 0.19.0 and torch 2.13.0 on a CPU, a random Qwen2 of one block written to a GGUF file
# in float32 by the gguf package. It is loaded twice: with nothing said about quantisation, and with
# GgufConfig(dequantize=True), whose documentation says that this is also what happens by itself where a file's weights
# cannot stay as they are. Both times the model is dense: plain linear layers, float32, the same tensors to the bit.
# save_pretrained writes the second one and raises ValueError for the first, calling it quantised and not serializable.
#
# What one would have guessed: that the two are alike in this too, since the first holds nothing that is quantised.
#
# Output seen:
#   same tensors: True, plain linears: True True
#   saved: by itself no (ValueError: The model is quantized with gguf and is not serializable), asked for yes
#
# Installs the packages in a temporary folder; fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import logging
import sys
from importlib.metadata import version

import gguf
import numpy
import torch
from transformers import AutoModelForCausalLM, GgufConfig

logging.disable(logging.WARNING)
WIDTH, INNER, WORDS = 32, 64, 64

writer = gguf.GGUFWriter("model.gguf", "qwen2")
writer.add_block_count(1)
writer.add_context_length(64)
writer.add_embedding_length(WIDTH)
writer.add_feed_forward_length(INNER)
writer.add_head_count(2)
writer.add_head_count_kv(1)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_rope_freq_base(10000.0)
writer.add_vocab_size(WORDS)
shapes = {"token_embd.weight": (WORDS, WIDTH), "output_norm.weight": (WIDTH,)}
for name, rows in (("attn_q", WIDTH), ("attn_k", WIDTH // 2), ("attn_v", WIDTH // 2)):
    shapes |= {f"blk.0.{name}.weight": (rows, WIDTH), f"blk.0.{name}.bias": (rows,)}
shapes |= {"blk.0.attn_output.weight": (WIDTH, WIDTH), "blk.0.attn_norm.weight": (WIDTH,)}
shapes |= {"blk.0.ffn_norm.weight": (WIDTH,), "blk.0.ffn_down.weight": (WIDTH, INNER)}
shapes |= {"blk.0.ffn_gate.weight": (INNER, WIDTH), "blk.0.ffn_up.weight": (INNER, WIDTH)}
draw = numpy.random.default_rng(0)
for name, shape in shapes.items():
    writer.add_tensor(name, draw.standard_normal(shape).astype(numpy.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

load = AutoModelForCausalLM.from_pretrained
by_itself = load(".", gguf_file="model.gguf", dtype=torch.float32)
asked_for = load(".", gguf_file="model.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
ours, theirs = by_itself.state_dict(), asked_for.state_dict()
same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
plain = [type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear for model in (by_itself, asked_for)]
said = ""
try:
    by_itself.save_pretrained("by-itself")
except ValueError as error:
    said = str(error).partition(" - ")[0]
asked_for.save_pretrained("asked-for")
print(", ".join(f"{name} {version(name)}" for name in ("transformers", "gguf", "torch")))
print(f"same tensors: {same}, plain linears: {plain[0]} {plain[1]}")
print(f"saved: by itself {f'no (ValueError: {said})' if said else 'yes'}, asked for yes")
sys.exit(0 if same and all(plain) and "not serializable" in said else "this has changed")
PY
