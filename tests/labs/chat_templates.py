"""Small chat templates in the manner of those in use, a tokenizer for them, and what each closes a turn with."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class Manner(NamedTuple):
    """One manner of writing conversations: the template, its end-of-sequence token, what closes a turn of the
    assistant's that another follows, and the last one."""

    template: str
    eos: str
    closes: str
    closes_last: str


def written(text: str) -> str:
    """The template of these lines, without the line ends and indents that make it readable."""
    return "".join(line.strip() for line in text.splitlines())


CHATML = Manner(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "<|im_end|>",
    "<|im_end|>\n",
    "<|im_end|>\n",
)
THOUGHTS_DROPPED = Manner(  # earlier thoughts are left out, the last turn has one even if it is empty
    written(
        """
        {% set ns = namespace(last=-1) %}
        {% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
        {% for m in messages %}
        {{ '<|im_start|>' + m.role + '\\n' }}
        {% if m.role == 'assistant' %}
            {% set thought = '' %}{% set said = m.content %}
            {% if '</think>' in said %}
                {% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
                {% set said = said.split('</think>')[-1].lstrip('\\n') %}
            {% endif %}
            {% if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
            {{ said }}
        {% else %}{{ m.content }}{% endif %}
        {{ '<|im_end|>\\n' }}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
        """
    ),
    "<|im_end|>",
    "<|im_end|>\n",
    "<|im_end|>\n",
)
THOUGHT_OPENED = Manner(  # the prompt opens a thought; turns are written without theirs
    written(
        """
        {% for m in messages %}
        {% if m.role == 'assistant' %}
            {% set said = m.content.split('</think>')[-1] if '</think>' in m.content else m.content %}
            {{ '<|Assistant|>' + said + '<|end_of_sentence|>' }}
        {% elif m.role == 'user' %}{{ '<|User|>' + m.content }}
        {% else %}{{ m.content }}{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}
        """
    ),
    "<|end_of_sentence|>",
    "<|end_of_sentence|>",
    "<|end_of_sentence|>",
)
BRACKETS = Manner(  # the system's words go into the first user's turn, white space is moved, roles must alternate
    written(
        """
        {% if messages[0].role == 'system' %}
            {% set turns = messages[1:] %}{% set first = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
        {% else %}{% set turns = messages %}{% set first = '' %}{% endif %}
        {% for m in turns %}
        {% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
            {{ raise_exception('roles must alternate: ' + m.content) }}
        {% endif %}
        {% if m.role == 'user' %}
            {{ bos_token + '[INST] ' + (first + m.content if loop.first else m.content).strip() + ' [/INST]' }}
        {% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}
        {% endfor %}
        """
    ),
    "</s>",
    " </s>",
    " </s>",
)
HEADERS = Manner(
    written(
        """
        {{ bos_token }}
        {% for m in messages %}
        {{ '<|start_header|>' + m.role + '<|end_header|>\\n\\n' + m.content | trim + '<|eot|>' }}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|start_header|>assistant<|end_header|>\\n\\n' }}{% endif %}
        """
    ),
    "<|eot|>",
    "<|eot|>",
    "<|eot|>",
)
NO_SYSTEM = Manner(
    written(
        """
        {{ bos_token }}
        {% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
        {% for m in messages %}
        {% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}
        {{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
        {{ m.content | trim + '<end_of_turn>\\n' }}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
        """
    ),
    "<end_of_turn>",
    "<end_of_turn>\n",
    "<end_of_turn>\n",
)
END_OF_ALL = Manner(  # a conversation that asks for nothing ends with a token of its own
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    "<|endoftext|>",
    "<|end|>\n",
    "<|end|>\n<|endoftext|>",
)
PAIRS = Manner(  # half a pair is not written at all
    "{% for i in range(0, messages|length - 1, 2) %}"
    "{{ '[U]' + messages[i].content + '[A]' + messages[i + 1].content + '</s>' }}{% endfor %}",
    "</s>",
    "</s>",
    "</s>",
)
MARKED = Manner(  # says itself what is generated
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\\n' }}{% endfor %}",
    "<|end|>",
    "<|end|>",
    "<|end|>",
)
MANNERS = {
    "chatml": CHATML,
    "thoughts dropped": THOUGHTS_DROPPED,
    "thought opened": THOUGHT_OPENED,
    "brackets": BRACKETS,
    "headers": HEADERS,
    "no system": NO_SYSTEM,
    "end of all": END_OF_ALL,
    "pairs": PAIRS,
    "marked": MARKED,
}


def tokenizer_of(template: str, eos: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes with this template and end-of-sequence token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer
