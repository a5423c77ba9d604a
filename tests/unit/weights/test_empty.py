"""A model is built without its weights whatever its constructor does, whose values never stay in the copy."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaConfig, LlamaForCausalLM

from verl_valgen.weights.empty import empty_like
from verl_valgen.weights.gather import gather
from verl_valgen.weights.plain_copy import PlainCopy

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.arange(3, 30)[None]


class RandomLlama(LlamaForCausalLM):
    """Draws all kinds of tensors in a constructor, by functions that take no notice of the meta device and others."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.normal(1, 0.1, size=(16,)))
        self.kept = nn.Parameter(torch.FloatTensor(37).uniform_(), requires_grad=False)
        self.register_buffer("saved", torch.rand(37))
        self.register_buffer("unsaved", torch.normal(0, 1, size=(37,)), persistent=False)
        self.attribute = torch.randn(37)
        self.several = [torch.randn(37), {"last": torch.randn(37)}]

    def forward(self, input_ids: Tensor, **kwargs: object) -> Tensor:
        hidden = self.model(input_ids=input_ids).last_hidden_state * self.scale
        extra = self.kept + self.saved + self.unsaved + self.attribute + self.several[0] + self.several[1]["last"]
        return self.lm_head(hidden) + extra


class NeedsBuffers(LlamaForCausalLM):
    """Reads a tensor that it makes."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.register_buffer("beta", torch.tensor(0.5))
        self.factor = self.beta.item()

    def forward(self, input_ids: Tensor, **kwargs: object) -> Tensor:
        return self.lm_head(self.model(input_ids=input_ids).last_hidden_state) * self.factor * self.beta


class NeedsParameters(NeedsBuffers):
    """Reads a parameter, which has no value unless the model is built for good."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.full((1,), 2.0))
        self.factor = self.gain.item()


def build(cls: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = cls(LlamaConfig(**SHAPE)).eval()
    torch.manual_seed(1)  # a constructor that drew now would draw something else
    return model


@pytest.mark.parametrize("cls", [RandomLlama, NeedsBuffers, NeedsParameters])
@pytest.mark.parametrize("tied", [False, True])
def test_the_copy_is_the_model_whatever_its_constructor_does(cls, tied):
    source = build(cls)
    if tied:
        source.config.tie_word_embeddings = True
        source.tie_weights()
    state = torch.get_rng_state()
    copy = gather(source, dtype=torch.float32, device=CPU, keep=True)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(copy(IDS), source(IDS))
    assert (copy.lm_head.weight is copy.model.embed_tokens.weight) is tied
    assert gather(source, dtype=torch.bfloat16, device=CPU, keep=True).lm_head.weight.dtype is torch.bfloat16


def test_random_parameters_of_an_architecture_come_from_the_trainer():
    torch.manual_seed(0)
    source = DiffLlamaForCausalLM(DiffLlamaConfig(**SHAPE)).eval()
    torch.manual_seed(1)
    copy = gather(source, dtype=torch.float32, device=CPU, keep=True)
    assert torch.equal(copy(IDS).logits, source(IDS).logits)


def test_a_parameter_with_a_value_of_the_constructors_is_missed_if_it_never_comes():
    source = build(RandomLlama)
    copy = PlainCopy(empty_like(source, torch.float32), CPU, source=source)
    for name, parameter in source.named_parameters():
        if name != "scale":
            copy.receive(name, parameter)
    with pytest.raises(RuntimeError, match=r"1 parameters were not gathered, scale first"):
        copy.finish()


@pytest.mark.parametrize(("cls", "num_failed"), [(RandomLlama, 1), (NeedsBuffers, 1), (NeedsParameters, 2)])
def test_debug_says_which_ways_of_building_a_model_did_not_work(caplog, cls, num_failed):
    with caplog.at_level(logging.DEBUG, logger="verl_valgen.weights"):
        model = empty_like(build(cls), torch.bfloat16)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    lines = [record.getMessage() for record in caplog.records if "built" in record.getMessage()]
    assert len(lines) == num_failed


def test_a_constructor_that_always_fails_says_why():
    class Fails(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            if config.vocab_size == 36:
                raise ValueError("planted")

    source = build(Fails)
    source.config.vocab_size = 36
    with pytest.raises(ValueError, match="planted"):
        gather(source, dtype=torch.float32, device=CPU, keep=True)
    assert torch.get_default_dtype() is torch.float32


def test_rotary_tables_that_a_long_sequence_has_changed_are_copied_as_they_were_built():
    config = LlamaConfig(**SHAPE, max_position_embeddings=16, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    torch.manual_seed(0)
    source = LlamaForCausalLM(config).eval()
    expected = source(IDS[:, :12]).logits
    source(torch.arange(60)[None] % 37)
    copy = gather(source, dtype=torch.float32, device=CPU, keep=True)
    assert torch.equal(copy(IDS[:, :12]).logits, expected)


class DrawsItself(LlamaForCausalLM):
    """Draws by methods of tensors, and by a function to which the tensor is given by its name."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.empty(16).normal_())
        self.shift = nn.Parameter(nn.init.kaiming_uniform_(tensor=torch.empty(16, 1)))


@pytest.mark.parametrize("cls", [LlamaForCausalLM, DrawsItself])
def test_no_values_are_drawn_for_tensors_that_have_none(cls):
    drawn = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            drawn.extend([str(func)] if "normal" in str(func) or "uniform" in str(func) else [])
            return func(*args, **(kwargs or {}))

    source = build(cls)
    with Watching():
        empty = empty_like(source, torch.bfloat16)
    assert drawn == []
    found = {name: parameter.shape for name, parameter in empty.named_parameters()}
    assert found == {name: parameter.shape for name, parameter in source.named_parameters()}
