#!/usr/bin/env bash
# transformers: of a T5 whose head is not its embedding (v1.1, Flan), resizing the vocabulary replaces the head by the embedding.
#
# Seen with transformers 5.23.0 and torch 2.13.0 on a CPU, a random model of two blocks. A T5 checkpoint that says
# `tie_word_embeddings: false` and holds both matrices is loaded with both: its configuration then says true, and a
# warning advises to set what was set. `resize_token_embeddings`, as one does after adding tokens, makes the two one
# matrix: the head is gone, logits of the old tokens move by more than the model's own spread, and what is saved afterwards
# holds the embedding alone. `T5Config(tie_word_embeddings=False)` says true as well, so a fresh model has no head of its
# own either; only that the decoder's outputs are not scaled is remembered. Llama keeps its head apart in the same steps.
#
# What one would have guessed: that `tie_word_embeddings=False` is kept, as for other models, and that resizing copies
# both matrices. Keep a copy of `lm_head.weight` before resizing, and compare after.
#
# Output seen:
#   t5       asked for False, the configuration says True; loaded apart: True; after resizing apart: False, old logits moved: True
#   llama    asked for False, the configuration says False; loaded apart: True; after resizing apart: True, old logits moved: False
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
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(3, 9)[None]


def walk(name, cls, config, inputs):
    """A checkpoint with a head of its own: what is left of it after loading, and after more tokens were added."""
    asked = config.tie_word_embeddings
    folder = Path(name)
    cls(config).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "tie_word_embeddings": False}))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(32, 16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = cls.from_pretrained(folder).eval()

    def apart():
        return not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)

    loaded = apart()
    with torch.no_grad():
        before = model(**inputs).logits
        model.resize_token_embeddings(40, mean_resizing=False)
        after = model(**inputs).logits[..., :32]
    moved = bool((after - before).abs().max() > before.std())
    resized = apart()
    print(f"{name:<8} asked for False, the configuration says {asked}; loaded apart: {loaded}; "
          f"after resizing apart: {resized}, old logits moved: {moved}")
    return asked, loaded, resized, moved


print("transformers", transformers.__version__, "torch", torch.__version__)
t5 = T5Config(vocab_size=32, tie_word_embeddings=False, **T5)
llama = LlamaConfig(vocab_size=32, tie_word_embeddings=False, **LLAMA)
found = (
    walk("t5", T5ForConditionalGeneration, t5, {"input_ids": IDS, "decoder_input_ids": IDS}),
    walk("llama", LlamaForCausalLM, llama, {"input_ids": IDS}),
)
sys.exit(0 if found == ((True, True, False, True), (False, True, True, False)) else "this has changed")
PY
