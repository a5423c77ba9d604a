"""Triton's kernels on CPU, by Triton's interpreter, and whether they can be had."""

from __future__ import annotations

import logging

import pytest
import torch
from interpreted import assert_cases_pass

from verl_valgen.backends.fast import kernels
from verl_valgen.backends.fast.attention import has_flash


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing is known of any device, before and afterwards."""
    kernels._why_unavailable.cache_clear()
    yield
    kernels._why_unavailable.cache_clear()


@pytest.mark.any_verl
def test_kernels_give_what_torchs_operations_do():
    assert_cases_pass("kernel_cases.py")


def test_no_kernels_on_cpu(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "_try_kernel", lambda device: pytest.fail("Triton was asked"))
    with caplog.at_level(logging.DEBUG, logger=kernels.__name__):
        assert not kernels.are_available(torch.device("cpu"))
    assert not caplog.records


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        ImportError("No module named 'triton'"),
        OSError("libcuda.so.1: cannot open shared object file"),
    ],
)
def test_why_there_are_none_is_said_once(monkeypatch, caplog, failure):
    num_tries = 0

    def try_kernel(device):
        nonlocal num_tries
        num_tries += 1
        raise failure

    monkeypatch.setattr(kernels, "_try_kernel", try_kernel)
    with caplog.at_level(logging.DEBUG, logger=kernels.__name__):
        assert not kernels.are_available(torch.device("cuda"))
        assert not kernels.are_available(torch.device("cuda", 0))
    [record] = caplog.records
    assert str(failure) in record.message
    assert record.levelno == logging.DEBUG
    assert num_tries == 1


def test_running_out_of_memory_says_nothing_about_kernels(monkeypatch):
    def try_kernel(device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "_try_kernel", try_kernel)
    with pytest.raises(torch.OutOfMemoryError):
        kernels.are_available(torch.device("cuda"))
    monkeypatch.setattr(kernels, "_try_kernel", lambda device: None)
    assert kernels.are_available(torch.device("cuda"))


@pytest.mark.parametrize(
    ("device", "is_built", "capability", "expected"),
    [
        ("cuda", True, (9, 0), True),
        ("cuda", True, (8, 0), True),
        ("cuda", True, (7, 5), False),
        ("cuda", False, (9, 0), False),
        ("cpu", True, (9, 0), False),
    ],
)
def test_flash_attention_is_asked_for_where_it_is(monkeypatch, device, is_built, capability, expected):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: is_built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_flash(torch.device(device)) is expected
