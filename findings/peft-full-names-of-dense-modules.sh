#!/usr/bin/env bash
# peft: a LoRA that names one dense module by its full name lands on the experts of another block, and not on it.
#
# Seen with peft 0.21.2, transformers 5.23.0 and torch 2.13.0 on a CPU, a random GLM-4-MoE of two blocks whose first is
# dense (first_k_dense_replace=1) and whose second is a mixture with fused experts. target_modules names exactly one
# module that exists, "model.layers.0.mlp.down_proj". After get_peft_model the configuration's target_modules is empty,
# its target_parameters holds the bare word "down_proj", the adapter sits on "model.layers.1.mlp.experts", and the module
# that was named has none. Nothing is raised. With another exact name beside it (an attention projection) that one is
# adapted as asked, and the dense one is exchanged for the experts all the same.
#
# What one would have guessed: that a full name that matches a module means that module. The rewriting that makes
# adapters of an older layout fit fused experts goes by the last part of the name, also where the name is of a module
# that is no expert.
#
# Output seen:
#   named:   model.layers.0.mlp.down_proj
#   adapted: model.layers.1.mlp.experts
#   left in the configuration: modules [], parameters ['down_proj']
#
# Installs the packages in a temporary folder; fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import sys

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

NAMED = "model.layers.0.mlp.down_proj"
sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
model = Glm4MoeForCausalLM(Glm4MoeConfig(vocab_size=64, first_k_dense_replace=1, **sizes, **heads, **experts))
assert isinstance(model.get_submodule(NAMED), torch.nn.Linear)

adapted = get_peft_model(model, LoraConfig(target_modules=[NAMED], r=2))
config = adapted.peft_config["default"]
places = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name, _ in adapted.named_parameters() if "lora_" in name}
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("named:  ", NAMED)
print("adapted:", ", ".join(sorted(places)))
modules, parameters = sorted(config.target_modules), sorted(config.target_parameters or [])
print(f"left in the configuration: modules {modules}, parameters {parameters}")
as_seen = places == {"model.layers.1.mlp.experts"} and modules == [] and parameters == ["down_proj"]
sys.exit(0 if as_seen else "this has changed")
PY
