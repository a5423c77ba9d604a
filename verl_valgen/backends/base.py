"""What a backend is: something that completes token ids. It never sees a tracker, a data set or verl."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from verl_valgen.samples import Completion, Request


class Backend(ABC):
    """Completes requests, with the weights and the parameters that it was made with. Not collective."""

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in the order of the requests.

        What a request is answered depends on that request alone, up to floating-point near-ties: not on its
        neighbours, their number or their order.
        """
