"""What transformers itself answers, as the other way to the same numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def greedy():
    """Texts that transformers goes on with, and how many tokens each has but for its end."""

    def answers(folder, prompts, num_new):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = []
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
            made = model.generate(input_ids=ids, max_new_tokens=num_new, do_sample=False)[0, ids.shape[1] :].tolist()
            ids = made[: made.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in made else made
            found.append((tokenizer.decode(ids, skip_special_tokens=True), len(ids)))
        return found

    return answers
