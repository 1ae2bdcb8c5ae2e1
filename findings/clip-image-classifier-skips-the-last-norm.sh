#!/usr/bin/env bash
# transformers: the image classifier of CLIP reads patches that were never normalised; SigLIP's, written alike, reads normalised ones.
#
# Seen with transformers 5.23.0 and torch 2.13.0 on a CPU, random models of two blocks. Both classifiers put one linear on the mean
# of `last_hidden_state`. In SigLIP that state is behind `post_layernorm`; in CLIP's image tower the norm is applied to the first
# place alone, on the way to `pooler_output`, which the classifier does not read. So of a CLIP classifier `post_layernorm` gets no
# gradient, scaling it a hundredfold changes no logit, and `last_hidden_state` keeps whatever size the blocks give it. Training it with
# DistributedDataParallel needs `find_unused_parameters`.
#
# What one would have guessed: that a classifier on CLIP reads what CLIP's own zero-shot comparison reads, the normalised first
# place, or at least a normalised state, as its sibling does. A head tuned on normalised states does not fit this class.
#
# Output seen:
#   clip    without gradient: ['vision_model.post_layernorm.bias', 'vision_model.post_layernorm.weight']; scaling the last norm moves logits: False
#   siglip  without gradient: []; scaling the last norm moves logits: True
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
from transformers import CLIPConfig, CLIPForImageClassification, SiglipConfig, SiglipForImageClassification

transformers.logging.set_verbosity_error()
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 8, "patch_size": 4}
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def seen(name, cls, config):
    torch.manual_seed(0)
    config.num_labels = 3
    model = cls(config).eval()
    before = model(pixel_values=IMAGES).logits
    before.square().sum().backward()
    unused = sorted(key for key, one in model.named_parameters() if one.requires_grad and one.grad is None)
    norm = next(part for key, part in model.named_modules() if key.endswith("post_layernorm"))
    with torch.no_grad():
        norm.weight.mul_(100)
        moved = not torch.equal(model(pixel_values=IMAGES).logits, before)
    unused = [key for key in unused if "head." not in key]  # SigLIP has a pooler of its own beside
    print(f"{name:<7} without gradient: {unused}; scaling the last norm moves logits: {moved}")
    return unused, moved


print("transformers", transformers.__version__, "torch", torch.__version__)
norms = ["vision_model.post_layernorm.bias", "vision_model.post_layernorm.weight"]
found = (
    seen("clip", CLIPForImageClassification, CLIPConfig(vision_config=TOWER)),
    seen("siglip", SiglipForImageClassification, SiglipConfig(vision_config=TOWER)),
)
sys.exit(0 if found == ((norms, False), ([], True)) else "this has changed")
PY
