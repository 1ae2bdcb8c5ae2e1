#!/usr/bin/env bash
# RWKV in transformers: with more than one row in a batch, going on from the kept state gives other logits.
#
# Seen with transformers 5.23.0 and torch 2.13.0 on a CPU, a random RWKV of two blocks in float32, two rows of nine
# tokens of equal length, no padding. The last token is read once within the whole row, and once by itself after the
# state that the first eight left behind. The documentation gives the state for just that. With one row the two agree
# within rounding (2e-7). With two rows in one batch they differ by more than a tenth (1.05 with this seed), no error is
# raised, and greedy generation with the cache gives other tokens than without it.
#
# What one would have guessed: that rows of a batch do not touch each other.
# What it comes from, by reading: the token-shift state kept between calls has the form (rows, width), and is mixed with
# a hidden state of the form (rows, 1, width); broadcasting makes (rows, rows, width) of the two when rows is above one.
#
# Output seen:
#   one row:  whole and continued differ by 2.4e-07
#   two rows: whole and continued differ by 1.05e+00
#   greedy tokens of two rows, cached and not: differ
#
# Installs the two packages in a temporary folder; fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import logging
import sys

import torch
import transformers
from transformers import RwkvConfig, RwkvForCausalLM

logging.disable(logging.WARNING)
torch.manual_seed(0)
sizes = {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
model = RwkvForCausalLM(RwkvConfig(vocab_size=50, context_length=64, **sizes)).eval()
rows = torch.randint(0, 50, (2, 9))


@torch.no_grad()
def difference(ids):
    whole = model(ids).logits[:, -1]
    before = model(ids[:, :-1], use_cache=True)
    continued = model(ids[:, -1:], state=before.state, use_cache=True).logits[:, -1]
    return float((whole - continued).abs().max())


print("transformers", transformers.__version__, "torch", torch.__version__)
one, two = difference(rows[:1]), difference(rows)
print(f"one row:  whole and continued differ by {one:.1e}")
print(f"two rows: whole and continued differ by {two:.2e}")
given = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(rows), "pad_token_id": 0}
cached, plain = (model.generate(rows, use_cache=use, **given) for use in (True, False))
print("greedy tokens of two rows, cached and not:", "the same" if torch.equal(cached, plain) else "differ")
as_seen = one < 1e-5 and two > 0.1 and not torch.equal(cached, plain)
sys.exit(0 if as_seen else "this has changed")
PY
