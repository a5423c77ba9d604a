"""The first link on two ranks: both come to the same finding, whatever fails on one, and neither waits for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import assets
import pytest
import torch
import torch.distributed as dist
from distributed.test_proven import small_host, wrong_weights
from distributed.testing import run_distributed
from transformers import LlamaForCausalLM

from verl_valgen.collectives import agree
from verl_valgen.hosts.base import Host
from verl_valgen.rounds import links as links_module
from verl_valgen.rounds import reading as reading_module
from verl_valgen.rounds.links import first_link
from verl_valgen.rounds.reading import Reading
from verl_valgen.weights.plain_copy import PlainCopy

CPU = torch.device("cpu")
TEXTS = [[5 + i % 60 for i in range(40)], [7, 9, 11, 13]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("links")
    assets.write_model(path / "model", hidden_size=32, intermediate_size=64)
    return path


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(f"planted on rank {dist.get_rank()}")


def finding(host: Host, *, dtype: torch.dtype = torch.bfloat16, texts: Any = TEXTS) -> list[Any]:
    copy = host.gather(dtype, keep=host.is_logging_rank)
    reading = Reading(host, None, 0, dtype, copy)  # type: ignore[arg-type]
    found = first_link(reading, texts if host.is_logging_rank else [])
    assert agree(True, CPU), "the ranks have lost each other"
    return list(found)


def of_copies(directory: Path, strategy: str, lora: bool) -> dict[str, Any]:
    host = small_host(directory, strategy, lora)
    modes = [module.training for module in host.model.modules()]
    shards = [parameter.detach().clone() for parameter in host.model.parameters()]
    state = torch.get_rng_state()
    results = {str(dtype): finding(host, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    results["one text"] = finding(host, texts=TEXTS[:1])
    results["long texts"] = finding(host, texts=[TEXTS[0] * 4, TEXTS[1], "never looked at"])
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in host.model.modules()] == modes
    assert all(torch.equal(*pair) for pair in zip(shards, host.model.parameters(), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainCopy, "finish", wrong_weights)
        results["wrong"] = finding(host)
    return results


@pytest.mark.parametrize(("strategy", "lora"), [("fsdp", False), ("fsdp2", True)])
def test_a_right_copy_passes_and_a_wrong_one_does_not(directory, tmp_path, strategy, lora):
    first, second = run_distributed(of_copies, 2, tmp_path, directory, strategy, lora)
    assert first == second
    wrong = first.pop("wrong")
    assert list(first.values()) == [[True, ""]] * 4
    assert wrong[0] is False
    assert wrong[1].startswith("the copy is not the trainer's model: at half of 39 positions its logits differ by ")


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """The number of texts of each pass of the trainer's model."""
    reads: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        read = Host.read
        patch.setattr(Host, "read", lambda self, texts, *args: (reads.append(len(texts)), read(self, texts, *args))[1])
        yield reads


def with_copies(change: Callable[[Any], Any]) -> Callable[[PlainCopy], Any]:
    """As `PlainCopy.finish`, with a fault in the copy."""
    finish = PlainCopy.finish

    def changed(self: PlainCopy) -> Any:
        model = finish(self)
        change(model)
        return model

    return changed


def blind_to(token: int) -> Callable[[Any], Any]:
    """A copy that takes one token for another."""

    def embed(module: Any, args: Any) -> Any:
        (ids,) = args
        return (ids.where(ids != token, 3),)

    return lambda model: model.get_input_embeddings().register_forward_pre_hook(embed)


def of_neighbours(model: Any) -> None:
    """As if a text had another's state where there are several."""

    def mixed(module: Any, args: Any, output: Any) -> None:
        output.logits = output.logits if len(output.logits) == 1 else output.logits.flip(0)

    model.register_forward_hook(mixed)


def of_passes(directory: Path, strategy: str) -> dict[str, Any]:
    """The findings of two rounds and the passes that they took, each with texts in one pass where that may be."""
    host = small_host(directory, strategy)
    texts = [[5 + i % 2 for i in range(40)], [70, 71, 72, 73, 74]]
    apart = lambda *args: False  # noqa: E731
    has_room = iter([False, True] * 2)
    results = {}
    for name, faults in {
        "right": [],
        "wrong in both": [(PlainCopy, "finish", wrong_weights)],
        "wrong in the longer": [(PlainCopy, "finish", with_copies(blind_to(6)))],
        "wrong in the shorter": [(PlainCopy, "finish", with_copies(blind_to(71)))],
        "room for one": [(reading_module, "fits", lambda *args: next(has_room))],
        "stateful": [(LlamaForCausalLM, "_is_stateful", True)],
        "neighbours": [(PlainCopy, "finish", with_copies(of_neighbours))],
    }.items():
        for way, more in (("", []), (", apart", [(links_module, "may_be_read_together", apart)])):
            if way and not name.startswith(("right", "wrong")):
                continue
            with pytest.MonkeyPatch.context() as patch, counted_reads() as reads:
                for owner, attribute, replacement in [*faults, *more]:
                    patch.setattr(owner, attribute, replacement, raising=False)
                found = [finding(host, dtype=torch.float32, texts=texts) for _ in range(2)]
                results[name + way] = {"found": found, "reads": list(reads)}
    return results


@pytest.fixture(scope="module")
def passes(directory, tmp_path_factory) -> dict[str, Any]:
    first, second = run_distributed(of_passes, 2, tmp_path_factory.mktemp("passes"), directory, "fsdp2")
    assert first == second
    return first


def test_unequal_texts_in_one_pass_are_found_what_they_are_one_at_a_time(passes):
    assert passes["right"] == {"found": [[True, ""]] * 2, "reads": [2, 2]}
    assert passes["right, apart"] == {"found": [[True, ""]] * 2, "reads": [1] * 4}
    for where in ("both", "the longer", "the shorter"):
        together, alone = passes[f"wrong in {where}"], passes[f"wrong in {where}, apart"]
        assert [verified for verified, _ in together["found"]] == [False] * 2, where
        assert together["found"] == alone["found"]
        assert together["reads"] == [2, 1, 1] * 2
    assert "at half of 4 positions" in passes["wrong in the shorter"]["found"][0][1]
    assert "at half of 39 positions" in passes["wrong in the longer"]["found"][0][1]


def test_texts_are_read_one_at_a_time_where_they_may_not_share_a_pass(passes):
    assert passes["stateful"] == {"found": [[True, ""]] * 2, "reads": [1] * 4}
    assert passes["room for one"] == {"found": [[True, ""]] * 2, "reads": [1] * 4}
    # Nothing told of this one before; then it is known.
    assert passes["neighbours"] == {"found": [[True, ""]] * 2, "reads": [2, 1, 1, 1, 1]}


def of_failures(directory: Path) -> dict[str, Any]:
    host = small_host(directory)
    other, logging = dist.get_rank() == 1, dist.get_rank() == 0
    read = type(host).read
    results = {}
    for name, is_here, owner, attribute, replacement in (
        ("parameters on one", other, type(host), "on_device", fail),
        ("memory on one", other, reading_module, "fits", lambda *args: False),
        ("after reading on one", other, type(host), "read", lambda *args: fail(read(*args))),
        ("after reading on the logging rank", logging, type(host), "read", lambda *args: fail(read(*args))),
        ("the copy", logging, links_module, "read_by_copy", fail),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if is_here:
                patch.setattr(owner, attribute, replacement)
            results[name] = finding(host)
    results["no texts"] = finding(host, texts=[[], [3]])
    results["texts that are none"] = finding(host, texts=[None])
    return results


def test_what_fails_on_one_rank_is_an_open_finding_on_both(directory, tmp_path):
    first, second = run_distributed(of_failures, 2, tmp_path, directory)
    assert first == second
    assert {verified for verified, _ in first.values()} == {None}
    reasons = [reason for _, reason in first.values()]
    assert "planted on rank 1" in reasons[0] or "could not load" in reasons[0]
    assert "there is no room" in reasons[1]
    assert "planted on rank 1" in reasons[2]
    assert "planted on rank 0" in reasons[3]
    assert "planted on rank 0" in reasons[4]
    assert reasons[5] == "no row that could be read"
    assert "TypeError" in reasons[6]


def of_logprobs(directory: Path) -> dict[str, Any]:
    """Where the trainer's model gives no logits, and verl's own forward a mean log-probability on some ranks."""
    host: Any = small_host(directory)
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(host), "why_not_sharded", lambda self: "there are none")
        results["without a forward pass"] = finding(host)

        def mean_logprob(self: Any, input_ids: Any, output_ids: Any) -> float | None:
            (logits,) = self.read([input_ids], [len(output_ids)])
            found = logits.float().log_softmax(-1).gather(1, torch.tensor(output_ids)[:, None]).mean().item()
            return found if self.is_logging_rank else None

        patch.setattr(type(host), "mean_logprob", mean_logprob)
        results["right"] = finding(host)
        patch.setattr(type(host), "mean_logprob", lambda *args: (mean_logprob(*args) or 0.0) - 1.0)
        results["wrong"] = finding(host)
    return results


def test_where_there_are_no_logits_log_probabilities_are_compared(directory, tmp_path):
    first, second = run_distributed(of_logprobs, 2, tmp_path, directory)
    assert first == second
    assert first["right"] == [True, ""]
    assert first["wrong"][0] is False
    assert "mean log-probability" in first["wrong"][1]
    assert first["without a forward pass"][0] is None
