#!/usr/bin/env bash
# llama.cpp: an answer that holds a part of a character has none of the probabilities that were asked for.
#
# Seen with xllamacpp 2026.10.11549 (llama.cpp's own server, in one process) and gguf 0.19.0 on a CPU, a random llama of one
# block in float32 whose vocabulary is the 256 bytes. A completion with the log probabilities of five tokens is asked for
# four times, the token being chosen by a bias: the byte of the letter A, and 0xC3, which begins a character of two bytes,
# each once and three times. All four answers count their tokens. Those of the letter have one entry for each; in those of
# the other "logprobs" is null, as if none had been asked for, while the text holds a replacement character for every
# token. Nothing is raised or said.
#
# What one would have guessed: one entry for every token of an answer. An entry has a field "bytes", for just the tokens
# that are no text of their own; and who compares two models by the probabilities of the next token, as a test of this
# project does, draws such a token at times and then has nothing to compare.
#
# Output seen:
#   0x41: 1 token(s), text 'A', entries 1
#   0x41: 3 token(s), text 'AAA', entries 3
#   0xC3: 1 token(s), text '\ufffd', entries None
#   0xC3: 3 token(s), text '\ufffd\ufffd\ufffd', entries None
#
# Installs the packages in a temporary folder; fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import os
import sys
from importlib.metadata import version

import gguf
import numpy
import xllamacpp

WIDTH, INNER = 32, 64
tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_context_length(64)
writer.add_embedding_length(WIDTH)
writer.add_block_count(1)
writer.add_feed_forward_length(INNER)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_rope_dimension_count(WIDTH // 2)
writer.add_vocab_size(len(tokens))
writer.add_file_type(gguf.LlamaFileType.ALL_F32)
writer.add_tokenizer_model("llama")
writer.add_token_list(tokens)
writer.add_token_scores([0.0] * len(tokens))
writer.add_token_types(kinds)
writer.add_add_bos_token(False)
drawn = numpy.random.default_rng(0)
shapes = {"token_embd": (len(tokens), WIDTH), "output": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
shapes |= {f"blk.0.{part}": (WIDTH, WIDTH) for part in ("attn_q", "attn_k", "attn_v", "attn_output")}
shapes |= {"blk.0.ffn_gate": (INNER, WIDTH), "blk.0.ffn_up": (INNER, WIDTH), "blk.0.ffn_down": (WIDTH, INNER)}
shapes |= {"blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,)}
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", drawn.normal(0, 0.2, shape).astype(numpy.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

params = xllamacpp.CommonParams()
params.model.path = "model.gguf"
params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.n_gpu_layers = 64, 1, 1, 0
params.warmup, params.fit_params, params.verbosity = False, False, -1
server = xllamacpp.Server(params)


def ask(byte, number):
    """The answer of so many tokens, each of them that byte."""
    asked = {"prompt": [10, 11, 12], "max_tokens": number, "logprobs": 5, "temperature": 0.0}
    said = server.handle_completions({**asked, "logit_bias": [[3 + byte, 1000.0]]})
    return said["choices"][0], said["usage"]["completion_tokens"]


found = []
print("xllamacpp", version("xllamacpp"), "gguf", version("gguf"))
for byte in (0x41, 0xC3):
    for number in (1, 3):
        choice, counted = ask(byte, number)
        entries = None if choice["logprobs"] is None else len(choice["logprobs"]["content"])
        found.append((counted, entries))
        print(f"0x{byte:02X}: {counted} token(s), text {choice['text']!a}, entries {entries}")
sys.stdout.flush()
as_seen = found == [(1, 1), (3, 3), (1, None), (3, None)]
if not as_seen:
    print("this has changed", file=sys.stderr, flush=True)
os._exit(0 if as_seen else 1)  # the server's threads are still there
PY
