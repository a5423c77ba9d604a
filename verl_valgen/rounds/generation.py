"""From requests on the logging rank to completions there, with the ranks, the memory and the time that there are.

This module knows how ranks share the work; it knows neither data sets nor trackers. Answering has two halves: `begin`
gathers the weights, `finish` generates with them. Both stay in one file, as they agree on what each rank does.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import astuple, dataclass, field
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
from transformers import GenerationConfig

from verl_valgen.backends import LOCKSTEP_BACKEND, SHARDED, Way, backend_class, ways
from verl_valgen.backends.base import Backend, Limits, Loader, Work
from verl_valgen.collectives import OtherRankError, attempt, broadcast, rank, run_on_all_ranks, smallest, world_size
from verl_valgen.hosts.model_host import ModelHost
from verl_valgen.records import Completion, Request, pack, unpack
from verl_valgen.rounds.answers_bar import AnswersBar
from verl_valgen.rounds.needs import free_bytes
from verl_valgen.rounds.overlap import on_own_stream
from verl_valgen.rounds.plan import Plan, shares
from verl_valgen.rounds.planning import Planner
from verl_valgen.rounds.restore import preserved_blas_workspaces
from verl_valgen.settings.generation_config import special_tokens as of_model
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import describe

logger = logging.getLogger(__name__)


@dataclass
class GatheredRound:
    """Requests for which the weights are gathered, and which are still to be answered."""

    way: Way
    plan: Plan
    requests: list[Request]
    """All of the round, the same on all ranks."""
    share: list[Request]
    """The requests of this rank."""
    logging_rank: int
    dtype: torch.dtype
    """The dtype of the computation; through the sharded model it is the trainer's own."""
    deadline: float = math.inf
    """`time.time()` after which no answer is gathered."""
    began_at: float = 0.0
    """`time.monotonic()` before the weights were gathered."""
    cleanup: ExitStack = field(default_factory=ExitStack)
    """Closed when the answers are there: gives back the memory, and puts back what the round has offloading."""
    model: Any = None
    """What the loader has brought, on a rank that answers with it: the gathered copy, or an engine."""
    error: Exception | None = None
    """Why this rank has none."""
    is_beside_training: bool = False
    """Whether the logging rank answers alone, by `answer_alone`, while training goes on; the same on all ranks."""
    backend: Backend | None = None
    """Made ready, on the rank that answers beside training."""
    ready_at: float = 0.0
    """`time.monotonic()` when it was."""
    gathered_at: float = 0.0
    """`time.monotonic()` when the weights were gathered."""

    def discard(self) -> None:
        """Frees what was gathered, on the trainer's thread."""
        self.model = self.backend = None
        self.cleanup.close()


class Answerer:
    """Answers requests with the trainer's weights of the moment in which it begins.

    Args:
        special_tokens: Gives the ids that end answers, and the others; None: those of the model.
    """

    def __init__(
        self,
        host: ModelHost,
        settings: GenerationSettings,
        special_tokens: Callable[[], GenerationConfig] | None = None,
    ) -> None:
        self.host, self.settings = host, settings
        self.special_tokens = special_tokens or partial(of_model, host.generation_config, host.tokenizer)
        self.ways = [*ways(settings.backend, host.device.type), SHARDED]
        """The ways to answer, from the one that is asked for to the safest."""
        self.loaders: dict[str, Loader] = {}
        """By backend; each is made for its first round, and keeps what it wants to until the next one."""
        self.planner = Planner(host, settings)

    def __call__(self, requests: Sequence[Request] | None) -> list[Completion] | None:
        """Answers requests in one go: gathers the weights, then generates. Collective: all ranks must call."""
        return self.finish(self.begin(requests))

    def begin(
        self,
        requests: Sequence[Request] | None,
        way: Way | None = None,
        deadline: float | None = None,
        free_beside_training: Callable[[], float] | None = None,
    ) -> GatheredRound | None:
        """Shares the requests out and gathers the weights. Collective: all ranks must call.

        Args:
            requests: On the logging rank; None there if there are none to be had, which ends the call on all ranks.
                What the other ranks pass is not looked at.
            way: One of `ways`, the same on all ranks; None: the first.
            deadline: `time.time()` at which answering ends; None: as `generation.max_round_time_s` says.
            free_beside_training: Gives the bytes that the round may take of this rank's device while training goes on.
                Where they suffice on the logging rank, the round is made ready for `answer_alone`, and all that must
                not be done beside training is done. None, on all ranks: training waits.

        Returns:
            What `finish` (or `answer_alone`) wants; None where there is nothing to answer, and where another rank
            failed.

        Raises:
            Exception: On the logging rank alone, after the last collective: what failed there, or `OtherRankError` for
                what failed elsewhere.
        """
        began_at = time.monotonic()
        host = self.host
        way = way or self.ways[0]
        if deadline is None:
            deadline = time.time() + (self.settings.max_round_time_s or math.inf)
        logging_rank, all_requests = self._hand_out(requests)
        if not all_requests:
            return None
        with ExitStack() as stack:
            stack.enter_context(self._own_workspaces(way))
            offloading = stack.enter_context(ExitStack())
            prepare = partial(self._prepare, offloading, free_beside_training, way)
            free = run_on_all_ranks(prepare, host.is_logging_rank, host.device)
            if free is None:
                return None
            try:
                plan = None
                if free_beside_training is not None:
                    beside = [(now, later) for now, later, _ in free]
                    plan = self.planner.beside_training(all_requests, beside, logging_rank, way)
                is_beside_training = plan is not None
                least, kept = min(now for now, _, _ in free), {ranks_per_copy for _, _, ranks_per_copy in free}
                ranks_per_kept_copy = kept.pop() if len(kept) == 1 else 0
                plan = plan or self.planner.plan(all_requests, least, way, ranks_per_kept_copy=ranks_per_kept_copy)
            except Exception:  # on all ranks alike
                if host.is_logging_rank:
                    raise
                return None
            gathered = self._gathered(way, plan, all_requests, logging_rank, offloading)
            gathered.deadline, gathered.began_at = deadline, began_at
            is_ready = self._is_ready(gathered) if is_beside_training else True
            if is_ready:
                gathered.cleanup.push(stack.pop_all())
                return gathered
            gathered.discard()
            if is_ready is False:
                return None
        return self.begin(requests, way, deadline)  # there was no room beside training: then it waits

    def _own_workspaces(self, way: Way) -> AbstractContextManager[None]:
        """Frees at the end what cuBLAS was given in this round. Not where there is an engine, asleep or awake: its CUDA
        graphs go on to write to where the workspace was when they were captured."""
        has_graphs = way.is_engine or any(loader.ranks_per_kept_copy for loader in self.loaders.values())
        return nullcontext() if has_graphs else preserved_blas_workspaces(self.host.device)

    def _gathered(
        self, way: Way, plan: Plan, requests: list[Request], logging_rank: int, offloading: ExitStack
    ) -> GatheredRound:
        """Gives this rank its share, and has the weights brought. Collective: all ranks must call."""
        # The logging rank is among the first to be given a share.
        position = plan.position(rank(), logging_rank, world_size())
        indices = shares(len(requests), plan.num_copies)[position] if position < plan.num_copies else range(0)
        share = [requests[i] for i in indices]
        dtype = self.host.compute_dtype if plan.is_sharded else self.planner.dtype
        gathered = GatheredRound(way, plan, requests, share, logging_rank, dtype)
        if not plan.is_sharded:
            loader = self._loader(way)
            gathered.cleanup.callback(loader.release)
            work = self.planner.work(way, plan, requests, share)
            gathered.model, gathered.error = attempt(partial(self._load, loader, work, offloading))
        return gathered

    def finish(self, gathered: GatheredRound | None) -> list[Completion] | None:
        """Answers the requests of a gathered round on all ranks that have a share. Collective: all ranks must call.

        Returns:
            One completion per request, in their order, on the logging rank; None elsewhere. [] on the logging rank
            where there was nothing to answer.

        Raises:
            Exception: As for `begin`.
        """
        if gathered is None:
            return [] if self.host.is_logging_rank else None
        plan = gathered.plan
        with gathered.cleanup:
            # Where only the logging rank answers, the ranks need not hear of each other.
            results = run_on_all_ranks(
                lambda: self._generate(gathered),
                self.host.is_logging_rank,
                None if plan.num_ranks == 1 else self.host.device,
            )
        if results is None or not self.host.is_logging_rank:
            return None
        answering = [plan.first_rank(n, gathered.logging_rank, world_size()) for n in range(plan.num_copies)]
        # One rank alone has exchanged nothing.
        in_order = results if len(results) == 1 else [results[one] for one in answering]
        return [Completion(*fields) for completions in in_order for fields in completions]

    def answer_alone(self, gathered: GatheredRound) -> list[Completion]:
        """Answers a round that was made ready, one completion per request, while training goes on. Not collective.

        To be called on the logging rank, in a thread of its own. Frees nothing that training has ever used.
        """
        assert gathered.backend is not None
        return self._timed(gathered.backend, gathered)

    def _hand_out(self, requests: Sequence[Request] | None) -> tuple[int, list[Request]]:
        """Returns the logging rank and its requests on every rank. Collective: all ranks must call."""
        packed, error = None, None
        try:
            packed = None if requests is None else pack(requests)
        except Exception as e:  # the other ranks wait for a word
            error = e
        host = self.host
        logging_rank, received = broadcast([rank(), packed], host.is_logging_rank, host.device) or (rank(), None)
        if error is not None:
            raise error
        return logging_rank, [] if received is None else unpack(received)

    def _prepare(
        self, offloading: ExitStack, free_beside_training: Callable[[], float] | None, way: Way
    ) -> tuple[float, float, int]:
        """Moves the parameters to where they can be gathered from. Returns the numbers of bytes that are free then, and
        beside training; and how many ranks hold a copy together in the way's engine, if it has one: see `Loader`."""
        beside_training = free_beside_training() if free_beside_training is not None else 0.0
        offloading.enter_context(self.host.on_device())
        kept = self._loader(way).ranks_per_kept_copy if way.is_engine else 0
        return free_bytes(self.host.device), beside_training, kept

    def _is_ready(self, gathered: GatheredRound) -> bool | None:
        """Whether the logging rank can answer beside training; None where it lacks the memory that it seemed to have.
        Collective: all ranks must call.

        Raises:
            Exception: On the logging rank alone, after the last collective: why not.
        """
        gathered.is_beside_training, gathered.gathered_at = True, time.monotonic()
        error = gathered.error
        if error is None and gathered.model is not None:
            _, error = attempt(lambda: self._make_ready(gathered))
        gathered.ready_at = time.monotonic()
        # Where another rank kept this one from its copy, that rank knows why.
        may_try_again = isinstance(error, torch.OutOfMemoryError | OtherRankError)
        outcome = smallest(1 if error is None else 0 if may_try_again else -1, self.host.device)
        error = error or OtherRankError("another rank could not take part in the gather")
        if outcome < 0 and self.host.is_logging_rank:
            raise error
        if outcome == 0 and self.host.is_logging_rank:
            self.planner.warn_of_waiting(describe(error))
        return None if outcome == 0 else outcome > 0

    def _make_ready(self, gathered: GatheredRound) -> None:
        with torch.no_grad(), on_own_stream(self.host.device):
            backend = self._backend(gathered, self.host.own_tokenizer)
            backend.make_ready(gathered.share)
        gathered.backend = backend

    def close_loaders(self, ways: Sequence[Way]) -> None:
        """Closes the loaders of backends that none of these ways needs. To be called on all ranks."""
        for name in sorted(self.loaders.keys() - {way.backend for way in ways}):
            self.loaders.pop(name).close()

    def _loader(self, way: Way) -> Loader:
        if way.backend not in self.loaders:
            self.loaders[way.backend] = backend_class(way.backend, self.host.device.type).loader()
        return self.loaders[way.backend]

    def _load(self, loader: Loader, work: Work, offloading: ExitStack) -> Any:
        """What this rank answers with. Collective: all ranks must call."""
        loaded = loader.load(self.host, work)
        offloading.close()
        if loaded is None and work.share:
            raise OtherRankError("another rank could not prepare for the gather")
        return loaded

    def _generate(self, gathered: GatheredRound) -> list[list[Any]]:
        """This rank's completions, as lists of their fields. Collective with the sharded model: all ranks must call."""
        if gathered.error is not None:
            raise gathered.error
        if gathered.plan.is_sharded:
            return self._generate_through_the_sharded_model(gathered)
        model = gathered.model
        if model is None:
            return []
        # Where the trainer's model gives no logits the copy is wanted for the check of the answers.
        if self.settings.verify is False or self.host.why_not_sharded() is None or gathered.way.is_engine:
            gathered.model = None  # to be free when the answers are exchanged
        backend = self._backend(gathered, self.host.tokenizer, model)
        answers = self._timed(backend, gathered)
        if gathered.model is not None:
            backend.restore()
        # Ranks that hold a copy together have the same answers.
        return _as_lists(answers) if rank() % gathered.plan.ranks_per_copy == 0 or gathered.plan.num_ranks == 1 else []

    def _backend(self, gathered: GatheredRound, tokenizer: Any, model: Any = None) -> Backend:
        """The backend of a round's way, for the round's copy or for `model`."""
        model = gathered.model if model is None else model
        model.generation_config = self.special_tokens()
        logprobs = self.settings.verify is False or self.host.why_not_sharded() is not None
        limits = Limits(gathered.plan.batch_size, gathered.deadline, self.settings.compile, logprobs=logprobs)
        limits = gathered.way.within(limits)
        return backend_class(gathered.way.backend, self.host.device.type)(model, tokenizer, self.settings.seed, limits)

    def _generate_through_the_sharded_model(self, gathered: GatheredRound) -> list[list[Any]]:
        """Collective: all ranks must call."""
        from verl_valgen.weights.sharded import generating_through

        limits = gathered.way.within(Limits(gathered.plan.batch_size, gathered.deadline))
        with generating_through(self.host.model, self.special_tokens(), self.host.device) as model:
            backend: Any = resolve_name(LOCKSTEP_BACKEND)(
                model,
                self.host.tokenizer,
                self.settings.seed,
                limits,
                sequence_bytes=self.planner.sequence_bytes(gathered.share),
                logprobs_bytes=self.planner.logprobs_bytes(gathered.share),
            )
            return _as_lists(self._timed(backend, gathered))

    def _timed(self, backend: Backend, gathered: GatheredRound) -> list[Completion]:
        start, requests = time.perf_counter(), gathered.share
        is_wanted = self.host.is_logging_rank and self.settings.console != "none" and not gathered.is_beside_training
        bar = AnswersBar(len(requests), len(gathered.requests), gathered.began_at, is_wanted=is_wanted)
        backend.on_answers = bar.add
        with torch.no_grad(), bar:
            completions = backend.generate(requests)
        num_tokens = sum(len(completion.output_ids) for completion in completions)
        seconds = time.perf_counter() - start
        logger.debug("generated %d tokens for %d prompts in %.3f s", num_tokens, len(requests), seconds)
        return completions


def _as_lists(completions: Sequence[Completion]) -> list[list[Any]]:
    """The fields of each, to be sent."""
    return [list(astuple(completion)) for completion in completions]
