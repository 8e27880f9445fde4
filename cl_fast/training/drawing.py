"""Examples drawn step by step, beside what a trainer draws: an order without an end.

    Draw(len(data), seed, "prompts").next(16)    each once per epoch, other ones on each rank

It is computed, not stored (`permutations`), and a number tells where it is.
"""

from __future__ import annotations

from cl_fast.models.sharding import this_rank
from cl_fast.training.permutations import Permutation, order_key

__all__ = ["Draw"]


class Draw:
    """An endless stream of indices below `count`: each once per epoch, in a new order each time.

    The n-th index depends on (seed, source, count, n) alone. A call of `next` takes the next
    `batch_size` numbers for each rank, so that ranks draw different examples and together go
    through all of them.

    Attributes:
        drawn: how many were drawn so far, by all ranks; set it to go on from there.
    """

    def __init__(self, count: int, seed: int, source: str) -> None:
        self.count, self.seed, self.source = count, seed, source
        self.drawn = 0
        self._epoch, self._order = -1, Permutation(0, 0)

    def order(self, epoch: int) -> Permutation:
        """The order of an epoch, from 0."""
        if epoch != self._epoch:
            key = order_key(self.seed, self.source, epoch)
            self._epoch, self._order = epoch, Permutation(self.count, key)
        return self._order

    def __getitem__(self, n: int) -> int:
        epoch, place = divmod(n, self.count)
        return self.order(epoch)[place]

    def next(self, batch_size: int) -> list[int]:
        """The next indices of this rank."""
        rank, ranks = this_rank()
        start = self.drawn + rank * batch_size
        self.drawn += ranks * batch_size
        return [self[n] for n in range(start, start + batch_size)]
