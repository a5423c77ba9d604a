"""Keeps vLLM's engine from round to round: made for the first one, filled for each, asleep in between."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from verl_valgen.backends.base import Loader, WeightSource, Work
from verl_valgen.backends.lengths import longest_sequence
from verl_valgen.backends.vllm.making import EngineSize
from verl_valgen.collectives import attempt, gather_values, on_all_or_none
from verl_valgen.text import describe

if TYPE_CHECKING:
    from verl_valgen.backends.vllm.engine import Engine

logger = logging.getLogger(__name__)

_MOST_FAILURES = 2
_NONE, _FAILED, _SERVES, _TOO_SMALL = "none", "failed", "serves", "too small"


class EngineLoader(Loader):
    """Every rank has an engine, as all ranks together make its groups; on those that answer nothing it sleeps."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.is_given_up = False
        """Whether this rank's engine had failed in the last round."""
        self.failures: list[str] = []
        """Why none could be made, or one had to be given up; the same number on all ranks. It is tried once more, as
        memory may be free then, but not in every round: it takes a minute."""

    def load(self, source: WeightSource, work: Work) -> Engine | None:
        """Returns the engine with the weights of the moment; None on a rank that answers nothing. Collective.

        Raises:
            Exception: On all ranks, where one failed: what failed there, elsewhere `OtherRankError`.
        """
        device, size = source.device, _size(work, source)
        if len(self.failures) >= _MOST_FAILURES:
            raise RuntimeError(self.failures[-1])
        states = gather_values(self._state(size), device)
        if set(states) == {_SERVES}:
            self.failures.clear()  # the last round was a good one
        else:
            if self.engine is not None:
                logger.debug("the engine was made for %s: it is made anew for %s", self.engine.size, size)
            self.close()
            if _FAILED in states:
                self.failures.append("the engine has failed twice")
                if len(self.failures) >= _MOST_FAILURES:
                    raise RuntimeError(self.failures[-1])
            self.is_given_up = False
            self._make(source, work, size)
        engine, has_share = self.engine, bool(work.share)
        assert engine is not None
        on_all_or_none(lambda: source.stream(engine.load, work.dtype, keep=has_share), device)
        return engine if has_share else None

    @property
    def ranks_per_kept_copy(self) -> int:
        return 0 if self.engine is None or self.engine.has_failed else self.engine.size.tensor_parallel

    def _state(self, size: EngineSize) -> str:
        if self.engine is None:
            return _FAILED if self.is_given_up else _NONE
        return _FAILED if self.engine.has_failed else _SERVES if self.engine.serves(size) else _TOO_SMALL

    def release(self) -> None:
        if self.engine is not None:
            _, error = attempt(self.engine.sleep)
            if error is not None:
                logger.debug("the engine does not sleep: %s", describe(error))
            if self.engine.has_failed:  # what is half asleep can only be freed
                self.close()
                self.is_given_up = True

    def close(self) -> None:
        """Gives up the engine; the next round makes another one."""
        engine, self.engine = self.engine, None
        if engine is not None:
            _, error = attempt(engine.close)
            if error is not None:
                logger.debug("the engine does not end as it should: %s", describe(error))

    def _make(self, source: WeightSource, work: Work, size: EngineSize) -> None:
        """Collective: all ranks must call."""
        from verl_valgen.backends.vllm.engine import Engine

        def make() -> None:
            config, model_class = source.model_config, source.model_class
            self.engine = Engine(config, model_class, size, work.dtype, source.device, compile=work.compile)

        try:
            on_all_or_none(make, source.device)
        except Exception as e:
            self.failures.append(f"no engine could be made: {describe(e)}")
            self.close()
            raise RuntimeError(self.failures[-1]) from e


def _size(work: Work, source: WeightSource) -> EngineSize:
    longest = longest_sequence(work.requests, source.model_config)
    return EngineSize(work.ranks_per_copy, longest, work.batch_size, work.cache_bytes)
