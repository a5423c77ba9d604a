"""Loads streamed weights into vLLM's model and makes sure that they have arrived.

vLLM's model joins some tensors and splits all among ranks. Compared are the sum of their bits as sent, and the sum,
over the ranks, of the bits of what lies in the model afterwards. That does not depend on how tensors were joined and
split, and shows a load that is lost: into a copy, before a sleep that discards it, or not at all. (Not of experts,
whose layout is vLLM's own, nor of heads that several ranks have.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from verl_valgen.backends.vllm import versions
from verl_valgen.text import describe

_OUTPUT_HEADS = (".lm_head.weight", ".embed_out.weight")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def load(
    llm: Any,
    weights: Iterator[tuple[str, Tensor]],
    unreported: set[str],
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Loads all weights of a model. Collective over the ranks that hold it together.

    Args:
        unreported: Names of parameters that vLLM loads without saying so (experts have other names then): empty for the
            first load, before which weights are random, and filled by it.
        prepare: Called before; what it raises is raised as a failure of loading is.
        weights: Names as a checkpoint has them, with whole tensors, each valid until the next one is asked for.

    Raises:
        RuntimeError: On all of these ranks: loading failed on one; a parameter was not among the weights; or a tensor
            is not in the model.
    """
    group, size, _ = versions.tensor_parallel_group()
    sent = Sent(versions.model_of(llm), size, is_tied=versions.ties_embeddings(llm))
    failure, sums = "", {}
    try:
        prepare()
        model = versions.model_of(llm)
        before = {name: bit_sum(parameter) for name, parameter in model.named_parameters() if name not in unreported}
        loaded = versions.load_weights(llm, sent.watch(weights))
        failure = _missing(model, loaded, before, unreported)
        sums = sent.found()
        if not sums:
            failure = failure or "none of its tensors can be compared with what was sent"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic of what is written in Rust is no Exception
        if group is None:
            raise
        failure = describe(e)
    finally:
        exhaust(weights)  # others may wait for this rank's part in it; then all wait for each other below
    outcomes: list[Any] = [(failure, sums)]
    if group is not None:
        outcomes = [None] * size
        dist.all_gather_object(outcomes, (failure, sums), group=group)
    if failures := [failure for failure, _ in outcomes if failure]:
        raise RuntimeError(f"vLLM did not take the weights: {failures[0]}")
    for name, expected in sent.sums.items():
        found = sum(sums[name] for _, sums in outcomes) // (size if name in sent.replicated else 1)
        if (found - int(expected)) % 2**64:
            raise RuntimeError(f"vLLM does not have the weights that it was given: {name} differs")


def exhaust(weights: Iterator[object]) -> None:
    """Asks for all that is left, whatever comes of it."""
    with suppress(Exception):
        for _ in weights:
            pass


def _missing(model: nn.Module, loaded: set[str] | None, before: dict[str, Tensor], unreported: set[str]) -> str:
    """Says which parameters were not loaded. Those that vLLM does not report must at least have changed when they were
    loaded first."""
    if loaded is None:
        return ""
    silent = {name: p for name, p in model.named_parameters() if name not in loaded and name not in unreported}
    names = sorted(name for name, p in silent.items() if name not in before or bool(bit_sum(p) == before[name]))
    unreported.update(silent.keys() - set(names))
    return f"no weights for {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}" if names else ""


class Sent:
    """The sums of bits of tensors that pass by, where the model has a parameter of that name.

    Args:
        size: Number of ranks that hold the model together.
        is_tied: Whether the model uses the input's embeddings for the output, too.
    """

    def __init__(self, model: nn.Module, size: int, *, is_tied: bool = False) -> None:
        self.model, self.size, self.is_tied = model, size, is_tied
        self.parameters = dict(model.named_parameters())
        self.sums: dict[str, Tensor] = {}
        """Of whole tensors, by the parameter's name: () int64 each, wrapping around."""
        self._joined: dict[str, int] = {}
        """Numbers of elements that have come for parameters which several tensors make."""
        self.replicated: set[str] = set()
        """The names of parameters that every rank has whole."""
        self._lengths: dict[str, tuple[int, int]] = {}
        """For embeddings whose vocabulary is padded: which rows of the parameter count."""

    def watch(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Hands the weights on.

        Raises:
            RuntimeError: There is an output head of its own where the model has none: vLLM would leave it out.
        """
        for name, tensor in weights:
            if self.is_tied and f".{name}".endswith(_OUTPUT_HEADS):
                raise RuntimeError(f"the model ties its embeddings, and its adapters do not ({name})")
            own, is_joined = versions.own_name(self.model, name)
            parameter = self.parameters.get(own)
            if parameter is not None and (is_joined or self._is_comparable(own, tensor, parameter)):
                bits = bit_sum(tensor.to(parameter.dtype)).to(parameter.device)
                self.sums[own] = self.sums[own] + bits if own in self._joined else bits
                if is_joined:
                    self._joined[own] = self._joined.get(own, 0) + tensor.numel()
            yield name, tensor

    def _is_comparable(self, name: str, tensor: Tensor, parameter: Tensor) -> bool:
        shards = getattr(self.model.get_submodule(name.rpartition(".")[0]), "shard_indices", None)
        if shards is not None and parameter.ndim == tensor.ndim and parameter.shape[1:] == tensor.shape[1:]:
            begin, end = shards.org_vocab_start_index, shards.org_vocab_end_index
            self._lengths[name] = (0, end - begin)
            return self.size > 1 or end - begin == len(tensor)
        if parameter.shape == tensor.shape:
            if self.size > 1:
                self.replicated.add(name)
            return True
        pairs = zip(parameter.shape, tensor.shape, strict=False)
        divided = [whole for part, whole in pairs if part != whole]
        return parameter.ndim == tensor.ndim and len(divided) == 1 and parameter.numel() * self.size == tensor.numel()

    def found(self) -> dict[str, int]:
        """The sums of what lies in the model on this rank, for the same names. Waits for the device."""
        for name, numel in self._joined.items():
            if numel != self.parameters[name].numel() * self.size:  # some ranks have the same part
                del self.sums[name]
        sums = {}
        for name in self.sums:
            parameter = self.model.get_parameter(name)
            begin, end = self._lengths.get(name, (0, len(parameter) if parameter.ndim else 0))
            sums[name] = bit_sum(parameter[begin:end] if parameter.ndim else parameter)
        self.sums = dict(zip(self.sums, _to_host(list(self.sums.values())), strict=True))
        return dict(zip(sums, _to_host(list(sums.values())), strict=True))


def bit_sum(tensor: Tensor) -> Tensor:
    """() int64: the sum of a tensor's elements, their bits read as integers, wrapping around. On its device."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)


def _to_host(sums: list[Tensor]) -> list[Any]:
    return torch.stack(sums).tolist() if sums else []
