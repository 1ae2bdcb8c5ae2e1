"""Public text on its way through a model's blocks: each block reads it once, in order, and what it gives is carried on.

Whoever measures blocks names one after another, and sees all batches pass it; the blocks before have run by then, each
one time over all the text, and have let go of their weights. What is carried is the hidden state at the entry of the
next block, exactly: to the bit what a pass through the whole model gives there. It is kept in memory up to
`CARRIED_LIMIT_BYTES`, and on disk past that.

The model's own code makes masks and positions anew for every block: its forward pass runs with the blocks before
standing aside, and ends where the next block would begin. Where the first block makes what all others hand on (T5's
relative positions), it runs in every pass; what an encoder gives to its decoder's blocks is carried, too. A model whose
blocks hand on more than that is read from its beginning for every block: slower, and the same.

Shapes: B rows, T tokens of a row, S of what an encoder reads, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emulator.compression.activations import Batch, forward, on_device, read_by
from offsite.blockwise import block_by_block, outside_blocks, widened
from offsite.errors import ConfigError, UnsupportedModel
from offsite.mapped import let_go
from offsite.modelling.blocks import Stack, block_list, hidden_of, text_stack
from offsite.seq2seq.models import is_seq2seq
from offsite.staging import remove
from offsite.tensors import write_tensors

CARRIED_LIMIT_BYTES = 512 * 2**20
"""Hidden states that are kept in memory; a run that has more keeps the rest on disk."""

PROBE_TOKENS = 16
"""Tokens on which a model is tried."""

Watch = Callable[[Batch], AbstractContextManager[Any]]
"""What is around a block's pass of one batch, which is on the model's device: usually hooks."""


class Passage:
    """Batches of text on their way through `model`, which is not modified.

    Args:
        batches: ``input_ids`` and ``attention_mask``, (batch, tokens) int64 each.
        stack: of an encoder-decoder, the one whose blocks are read; of any other model its own.
        folder: where hidden states past the limit are kept meanwhile; None keeps all in memory.
        compute: dtype that the model computes in; None for that of its weights.
        limit_bytes: of hidden states in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        *,
        stack: Stack | None = None,
        folder: Path | None = None,
        compute: torch.dtype | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        self._model, self._batches, self._compute = model, batches, compute
        self._stack = text_stack(model) if stack is None else stack
        self._blocks = list(block_list(model, self._stack))
        self._carried = _Carried(folder, CARRIED_LIMIT_BYTES if limit_bytes is None else limit_bytes)
        self._next = 0  # the block that the carried states are to enter
        self._forms: list[_Form] | None = None
        self._sources: frozenset[int] = frozenset()  # blocks that make what others hand on, and run in every pass
        beside = None if folder is None else folder.with_name(f"{folder.name}-encoded")
        self._encoded = _Carried(beside, self._carried.limit_bytes) if _is_second(model, self._stack) else None

    def close(self) -> None:
        """Nothing is carried any more, and none of it is left on disk."""
        self._carried.clear()
        if self._encoded is not None:
            self._encoded.clear()
        self._next = 0

    @property
    def is_carried(self) -> bool:
        """Whether a block is given nothing by those before it but a hidden state, and what the first block makes.

        It is tried on a few tokens.
        """
        if self._forms is None:
            self._forms = self._studied()
        return bool(self._forms)

    def run(self, block: nn.Module, watch: Watch) -> None:
        """Every batch has passed `block`, inside of what `watch` gave for it; a block before the last one begins anew.

        Raises:
            ConfigError: when it is no block of the model, or there is no text.
            RunFailed: when what is carried does not fit on the disk.
        """
        number = next((i for i, one in enumerate(self._blocks) if one is block), None)
        if number is None:
            raise ConfigError(f"asked to read text through a {type(block).__name__} that is no block of the model")
        if not self._batches:
            raise ConfigError("measuring blocks needs public text, found none")
        if not self.is_carried:
            self._advance(range(number + 1), watch)
            return
        if number < self._next:
            self._carried.clear()
            self._next = 0
        while self._next < number:
            self._advance(range(self._next, self._next + 1), lambda _batch: nullcontext())
        self._advance(range(number, number + 1), watch)

    @property
    def _beside(self) -> list[nn.Module]:
        """What runs besides the blocks, but for the head, which is not reached."""
        head = self._model.get_output_embeddings()
        return [part for part in outside_blocks(self._model) if part is not head]

    def _batch(self, number: int) -> Batch:
        return on_device(self._batches[number], next(self._model.parameters()).device)

    @torch.no_grad()
    def _advance(self, numbers: range, watch: Watch) -> None:
        """All batches pass these blocks, and what comes out is carried; blocks before them stand aside."""
        used = [self._blocks[i] for i in numbers]
        running = [self._blocks[i] for i in sorted(self._sources & set(range(numbers[0])))] + used
        parts = [*self._beside, *(part for block in running for part in block.modules())]
        with ExitStack() as stack:
            stack.enter_context(widened(parts, self._compute))
            for i in range(numbers[0]):
                if i not in self._sources:
                    stack.enter_context(_standing_aside(self._blocks[i], (self._forms or [])[i]))
            for i in range(len(self._batches)):
                batch = self._batch(i)
                with ExitStack() as inner:
                    inner.enter_context(self._encoded_before(i))
                    if numbers[0]:
                        inject = _injecting(self._carried.get(i))
                        inner.callback(used[0].register_forward_pre_hook(inject, with_kwargs=True).remove)
                    inner.enter_context(watch(read_by(self._stack, batch)))
                    inner.callback(used[-1].register_forward_hook(_ending).remove)
                    state_BTD = self._reached(batch)
                if self._forms:
                    self._carried.put(i, state_BTD.to("cpu"))
        let_go(tensor for block in running for tensor in block.parameters())
        let_go(tensor for part in self._beside for tensor in part.parameters(recurse=False))
        self._next = numbers[-1] + 1

    @contextmanager
    def _encoded_before(self, number: int) -> Iterator[None]:
        """Inside of a decoder's pass, its encoder gives the batch's states, which are computed once."""
        if self._encoded is None:
            yield
            return
        from transformers.modeling_outputs import BaseModelOutput

        model: Any = self._model
        encoder = model.get_encoder()
        if number in self._encoded:
            place = next(self._model.parameters()).device
            given = BaseModelOutput(last_hidden_state=self._encoded.get(number).to(place))  # type: ignore[arg-type]
            vars(encoder)["forward"] = lambda *_, **__: given
            try:
                yield
            finally:
                del vars(encoder)["forward"]
            return
        found: list[Tensor] = []
        hook = encoder.register_forward_hook(lambda _module, _args, output: found.append(output.last_hidden_state))
        try:
            yield
        finally:
            hook.remove()
        self._encoded.put(number, found[0].to("cpu"))

    def _reached(self, batch: Batch) -> Tensor:
        """Return the hidden state (B, T, D) behind the block at which the forward pass ends."""
        try:
            forward(self._model, batch)
        except _Reached as reached:
            return reached.hidden_BTD
        raise UnsupportedModel(f"{type(self._model).__name__} does not run its blocks one after another")

    @torch.no_grad()
    def _studied(self) -> list[_Form]:
        """Return what each block gives beside its hidden state; nothing where more is handed on than can be carried.

        It can be when every block enters with what the one before it gave, and is given nothing else that it would not
        be given if all of them stood aside, or all but the first, which then is a source.
        """
        first = self._batch(0)
        batch = {name: tensor[:1, :PROBE_TOKENS] for name, tensor in first.items()}
        forms: list[_Form] = []
        with block_by_block(self._model, self._compute), self._noting(forms) as (entered, left):
            forward(self._model, batch)
        if len(entered) != len(self._blocks) or not all(map(_same, left[:-1], [one[0] for one in entered[1:]])):
            return []
        for sources in (frozenset[int](), frozenset([0])):
            aside = self._aside(batch, forms, sources)
            if _same([one[1:] for one in entered], [one[1:] for one in aside]):
                self._sources = sources
                return forms
        return []

    def _aside(self, batch: Batch, forms: Sequence[_Form], sources: frozenset[int]) -> list[_Entry]:
        """Return how each block is entered when all but the sources stand aside."""
        parts = [*self._beside, *(part for i in sources for part in self._blocks[i].modules())]
        with ExitStack() as stack:
            stack.enter_context(widened(parts, self._compute))
            for number, form in enumerate(forms):
                if number not in sources:
                    stack.enter_context(_standing_aside(self._blocks[number], form))
            aside, _ = stack.enter_context(self._noting([]))
            stack.callback(self._blocks[-1].register_forward_hook(_ending).remove)
            self._reached(batch)
        return aside

    @contextmanager
    def _noting(self, forms: list[_Form]) -> Iterator[tuple[list[_Entry], list[Tensor]]]:
        """Inside, each block's entry is noted, what it gave, and in which form."""
        entered: list[_Entry] = []
        left: list[Tensor] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_BTD, *rest = args if args else (kwargs["hidden_states"],)
            entered.append((hidden_BTD, tuple(rest), {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        def leave(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            left.append(hidden_of(output))
            given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            has_more = isinstance(output, (tuple, list))
            forms.append(tuple(_formed(one, given) for one in output[1:]) if has_more else None)

        with ExitStack() as stack:
            for block in self._blocks:
                stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(leave, with_kwargs=True).remove)
            yield entered, left


@dataclass(frozen=True)
class _Handed:
    """In a form: what the block was itself given, by position or name."""

    place: int | str

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.place, str):
            return kwargs.get(self.place)
        return args[self.place] if self.place < len(args) else None


def _formed(one: Any, given: Sequence[tuple[int | str, Any]]) -> Any:
    """Return what stands for an output in a form: a tensor is of this batch and no other."""
    if not isinstance(one, Tensor):
        return one
    place = next((place for place, what in given if what is one), None)
    return None if place is None else _Handed(place)


_Entry = tuple[Tensor, tuple[Any, ...], dict[str, Any]]
_Form = tuple[Any, ...] | None
"""What a block gives behind its hidden state; None where it gives that alone, and no tuple."""


def _is_second(model: PreTrainedModel, stack: Stack) -> bool:
    """Say whether the stack is an encoder-decoder's decoder."""
    return is_seq2seq(model) and "encoder" not in stack.name.split(".")


class _Reached(Exception):
    def __init__(self, hidden_BTD: Tensor) -> None:
        super().__init__()
        self.hidden_BTD = hidden_BTD


def _ending(_module: nn.Module, _args: Any, output: Any) -> None:
    raise _Reached(hidden_of(output))


def _injecting(given_BTD: Tensor) -> Callable[..., Any]:
    """Return a hook that hands a block the carried state."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state_BTD = given_BTD.to((args[0] if args else kwargs["hidden_states"]).device)
        return ((state_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state_BTD})

    return hook


def _same(one: Any, other: Any) -> bool:
    """Say whether what blocks are given is the same; objects of other kinds count as the same."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if one is None or isinstance(one, (bool, int, float, str)):
        return bool(one == other)
    return type(one) is type(other)


@contextmanager
def _standing_aside(block: nn.Module, rest: _Form) -> Iterator[None]:
    """Inside, the block gives what it is given, in the form in which it gives its own."""

    def forward_as_is(*args: Any, **kwargs: Any) -> Any:
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        if rest is None:
            return hidden_BTD
        return (hidden_BTD, *(one.of(args, kwargs) if isinstance(one, _Handed) else one for one in rest))

    vars(block)["forward"] = forward_as_is
    try:
        yield
    finally:
        del vars(block)["forward"]  # the class's own again


class _Carried:
    """Hidden states by batch, in memory up to a limit, past it in files of a folder."""

    def __init__(self, folder: Path | None, limit_bytes: int) -> None:
        self._folder, self.limit_bytes = folder, limit_bytes
        self._known: set[int] = set()
        self._held: dict[int, Tensor] = {}
        self._num_bytes = 0

    def __contains__(self, number: int) -> bool:
        return number in self._known

    def put(self, number: int, state_BTD: Tensor) -> None:
        """The state is kept, in place of the batch's last one."""
        self._known.add(number)
        before = self._held.pop(number, None)
        self._num_bytes -= 0 if before is None else before.nbytes
        if self._folder is None or self._num_bytes + state_BTD.nbytes <= self.limit_bytes:
            self._held[number] = state_BTD
            self._num_bytes += state_BTD.nbytes
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self._folder / _name(number), {"hidden": state_BTD})

    def get(self, number: int) -> Tensor:
        """Return the batch's state, with storage of its own."""
        from safetensors import safe_open

        if number in self._held or self._folder is None:
            return self._held[number]
        with safe_open(self._folder / _name(number), framework="pt") as handle:
            found: Tensor = handle.get_tensor("hidden")
        return found.clone()  # the file is written anew before the state is done with

    def clear(self) -> None:
        """Nothing is kept, in memory or on disk."""
        self._held.clear()
        self._known.clear()
        self._num_bytes = 0
        if self._folder is not None:
            remove(self._folder)


def _name(number: int) -> str:
    return f"carried-{number:05d}.safetensors"
