"""A tiny model, a tokenizer that cuts characters in two, and a model that says what it is told to."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["the patient has a fever and a cough", "the doctor asks how long the cough has lasted", "naïve café"]


class Parrot(LlamaForCausalLM):
    """Says `script` token by token whatever stands before it, then the end token.

    What comes next depends on the tokens alone: as much of the script as they end with was said.
    """

    def __init__(self, script: list[int], *, num_vocabulary: int, end: int, context: int = 4096) -> None:
        sizes = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
        super().__init__(LlamaConfig(vocab_size=num_vocabulary, max_position_embeddings=context, **sizes))
        self.script, self.end, self.num_forwards = script, end, 0
        self.generation_config = GenerationConfig(eos_token_id=end)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **_):
        self.num_forwards += 1
        ids = getattr(past_key_values, "seen", []) + input_ids[0].tolist()
        if past_key_values is not None:
            past_key_values.seen = ids
        said = max(upto for upto in range(len(self.script) + 1) if ids[len(ids) - upto :] == self.script[:upto])
        scores = torch.zeros(1, input_ids.shape[1], self.config.vocab_size)
        scores[0, -1, self.script[said] if said < len(self.script) else self.end] = 100.0
        return CausalLMOutputWithPast(logits=scores, past_key_values=past_key_values)


@pytest.fixture(scope="session")
def bytes_tokenizer():
    """A byte-level BPE tokenizer with a chat template; characters beyond its few texts take several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def spread_llama(bytes_tokenizer):
    """A random llama whose weights are large enough that it does not repeat one token."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(bytes_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.6,
        eos_token_id=bytes_tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def parrot(bytes_tokenizer):
    """Return a maker of models that say a text."""

    def make(text: str, *, context: int = 4096) -> Parrot:
        ids = bytes_tokenizer(text)["input_ids"]
        return Parrot(ids, num_vocabulary=len(bytes_tokenizer), end=bytes_tokenizer.eos_token_id, context=context)

    return make
