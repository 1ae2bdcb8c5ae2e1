#!/usr/bin/env bash
# transformers: the causal model of OPT computes without calling its own base model, so what hangs on that never runs.
#
# Seen with transformers 5.23.0 and torch 2.13.0 on a CPU, random models of two blocks. `base_model` of OPTForCausalLM is
# an OPTModel; the forward pass of the causal model calls the decoder inside of that and passes the OPTModel by. A forward
# hook on `base_model` (how one captures the last hidden states of "any" causal model, or puts a function of them in
# between) fires once with llama, gpt2, gpt_neox, bloom, falcon and mpt, and never with opt. Nothing is raised: a program
# that collects states gets none, one that changes them changes nothing. BART's causal model is the same; there the class's
# name says that it is a wrapper.
#
# What one would have guessed: that the base model is what the causal model calls, as `base_model_prefix` and the others
# suggest. Hook `get_decoder()` too, and take whichever fires.
#
# Output seen:
#   llama    base model LlamaModel, called 1 time(s)
#   gpt2     base model GPT2Model, called 1 time(s)
#   opt      base model OPTModel, called 0 time(s); its decoder OPTDecoder, called 1 time(s)
#
# Installs the packages in a temporary folder; fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
MORE = {
    "llama": {"intermediate_size": 32},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
}


def times_called(name):
    """How often one forward pass of the causal model calls its base model and its decoder."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **MORE[name])).eval()
    base, inner, calls = model.base_model, model.get_decoder(), {"base": 0, "inner": 0}

    def count(key):
        def hook(*_):
            calls[key] += 1
        return hook

    base.register_forward_hook(count("base"))
    if inner is not base:
        inner.register_forward_hook(count("inner"))
    with torch.no_grad():
        model(torch.arange(3, 10)[None])
    told = f"{name:<8} base model {type(base).__name__}, called {calls['base']} time(s)"
    if inner is not base:
        told += f"; its decoder {type(inner).__name__}, called {calls['inner']} time(s)"
    print(told)
    return calls["base"], calls["inner"]


print("transformers", transformers.__version__, "torch", torch.__version__)
found = {name: times_called(name) for name in MORE}
sys.exit(0 if found == {"llama": (1, 0), "gpt2": (1, 0), "opt": (0, 1)} else "this has changed")
PY
