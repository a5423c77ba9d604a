"""Which row of a batch answers which request: admission, and moving together. Pure Python, on the host.

A row that has answered keeps the keys of its prompt until another request gets it, so that a prompt that several
requests have is computed once as a rule. This module knows neither tensors nor models.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

Prompt = tuple[int, ...]
"""What a row holds of a prompt: its tokens but the last, which is the first input of a step."""


class Admission(NamedTuple):
    """A row for a request."""

    row: int
    request: int
    source: int | None
    """The row whose keys of the same prompt become its own: another one, or itself. None: they must be computed."""


class Move(NamedTuple):
    """A request that goes on in another row."""

    source: int
    target: int


class Rows:
    """Which request each row answers, and of which prompt it holds the keys.

    Args:
        num_rows: B.
    """

    def __init__(self, num_rows: int) -> None:
        self.requests: list[int | None] = [None] * num_rows
        """The request that a row answers."""
        self.prompts: list[Prompt | None] = [None] * num_rows
        """The prompt that a row holds."""
        self.num_answered = [0] * num_rows
        """The number of requests that a row was given before its last."""

    def __len__(self) -> int:
        return len(self.requests)

    def live(self) -> list[int]:
        """The rows that answer."""
        return [row for row, request in enumerate(self.requests) if request is not None]

    def free(self, num_rows: int) -> list[int]:
        """Those of the first rows that do not."""
        return [row for row in range(num_rows) if self.requests[row] is None]

    def release(self, rows: Iterable[int]) -> None:
        """The requests of these rows are answered. What they hold of the prompts stays."""
        for row in rows:
            self.requests[row] = None

    def forget(self, rows: Iterable[int]) -> None:
        """These rows get prompts that nobody will ask for again."""
        for row in rows:
            self.prompts[row] = None

    def give(self, waiting: Waiting, num_rows: int) -> list[Admission]:
        """Gives the free ones of the first rows to requests that wait, those first whose prompts are held.

        The sources of what is copied come before what is copied from them, and none is overwritten.
        """
        free = self.free(num_rows)
        given: list[Admission] = []
        # A free row that holds a prompt that waits is given to it. So none that is left holds one, and no row is
        # overwritten that others copy.
        for row in list(free):
            if (request := waiting.take(self.prompts[row])) is not None:
                free.remove(row)
                given.append(self._give(row, request, self.prompts[row], row))
        for source, prompt in enumerate(self.prompts):
            while free and (request := waiting.take(prompt)) is not None:
                given.append(self._give(free.pop(0), request, prompt, source))
        while free and (first := waiting.take_next()) is not None:
            request, prompt = first
            source = free.pop(0)
            given.append(self._give(source, request, prompt, None))
            while free and (request := waiting.take(prompt)) is not None:
                given.append(self._give(free.pop(0), request, prompt, source))
        return given

    def _give(self, row: int, request: int, prompt: Prompt | None, source: int | None) -> Admission:
        self.num_answered[row] += self.prompts[row] is not None
        self.requests[row], self.prompts[row] = request, prompt
        return Admission(row, request, source)

    def move_together(self, num_rows: int) -> list[Move]:
        """Moves the requests that are answered into the first rows, of which there must be enough.

        The rows of a move exchange what they hold: the prompt of the other one may be asked for again.
        """
        free = self.free(num_rows)
        moves = [Move(source, free.pop(0)) for source in self.live() if source >= num_rows]
        for source, target in moves:
            self.num_answered[target] += self.prompts[target] is not None
            self.requests[target], self.requests[source] = self.requests[source], None
            self.prompts[target], self.prompts[source] = self.prompts[source], self.prompts[target]
        return moves


class Waiting:
    """Requests that wait for a row, in their order.

    Args:
        prompts: By the request.
    """

    def __init__(self, prompts: Mapping[int, Prompt]) -> None:
        self._prompts = OrderedDict(prompts)  # whose first is found at once, however many have gone
        self._by_prompt: dict[Prompt | None, deque[int]] = {}
        for request, prompt in prompts.items():
            self._by_prompt.setdefault(prompt, deque()).append(request)

    def __len__(self) -> int:
        return len(self._prompts)

    def take(self, prompt: Prompt | None) -> int | None:
        """Takes out the first request with this prompt, None where there is none."""
        requests = self._by_prompt.get(prompt)
        if not requests:
            return None
        request = requests.popleft()
        del self._prompts[request]
        return request

    def take_next(self) -> tuple[int, Prompt] | None:
        """Takes out the first request, and returns it with its prompt."""
        if not self._prompts:
            return None
        request, prompt = next(iter(self._prompts.items()))
        self.take(prompt)
        return request, prompt


def sizes(num_rows: int, smallest: int) -> list[int]:
    """Returns the numbers of rows that a run goes through while fewer are left: each a quarter of the one before.

    Args:
        smallest: Below so many rows nothing is won.
    """
    found = [num_rows]
    while found[-1] > smallest:
        found.append(max(smallest, math.ceil(found[-1] / 4)))
    return found


def in_chunks(lengths: Mapping[int, int], most_tokens: int) -> list[list[int]]:
    """Cuts prompts into batches that are padded to their longest, the shortest first.

    Args:
        lengths: The number of tokens of each prompt, by any key.
        most_tokens: Of a batch, padding included; more only for a prompt that is longer by itself.
    """
    chunks: list[list[int]] = []
    for key in sorted(lengths, key=lambda key: lengths[key]):
        if not chunks or lengths[key] * (len(chunks[-1]) + 1) > most_tokens:
            chunks.append([])
        chunks[-1].append(key)
    return chunks
