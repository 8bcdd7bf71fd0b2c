"""The directions of gradient canaries: unit vectors over all trained parameters, drawn with the coins.

`orthogonal` directions are the columns of a random orthonormal matrix where that is quickly made. Of a larger model
each direction has coordinates of its own: a random permutation deals all coordinates out, and each counts with a random
sign and equal weight. Both are orthonormal and independent of data and training, which is all that the channel needs
(dpaudit.evidence.channel): noise of covariance s^2 I shows along each of them as an independent N(0, s^2). The second
takes time and memory in proportion to the parameters, whatever the number of directions; the matrix takes memory
in proportion to both, and time to the square of the directions (18 s for 1,256 of them over 50,000 parameters).
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

Kind = Literal["orthogonal", "dirac", "random"]
DENSE = 1 << 22  # numbers of a matrix of directions; where there would be more they share no coordinate


class Directions(Protocol):
    """n unit vectors over P parameters."""

    def __len__(self) -> int: ...

    def along(self, flat: Tensor) -> Tensor:
        """(n,) products with `flat`, (P,) float32."""
        ...

    def row(self, index: int) -> Tensor:
        """(P,) one of them."""
        ...

    def total(self, indices: Tensor) -> Tensor:
        """(P,) the sum of several, each named once."""
        ...


@dataclass(frozen=True)
class Dense:
    """vectors: (n, P)."""

    vectors: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    def along(self, flat: Tensor) -> Tensor:
        """See Directions."""
        return self.vectors @ flat

    def row(self, index: int) -> Tensor:
        """See Directions."""
        return self.vectors[index]

    def total(self, indices: Tensor) -> Tensor:
        """See Directions."""
        return self.vectors[indices].sum(dim=0)


@dataclass(frozen=True)
class Disjoint:
    """places: (n, w) coordinates, each at most once. signs: (n, w) of -1 and 1. size: P."""

    places: Tensor
    signs: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.places)

    def along(self, flat: Tensor) -> Tensor:
        """See Directions."""
        found: Tensor = (flat[self.places] * self.signs).sum(dim=1) / self.places.shape[1] ** 0.5
        return found

    def row(self, index: int) -> Tensor:
        """See Directions."""
        return self.total(torch.tensor([index]))

    def total(self, indices: Tensor) -> Tensor:
        """See Directions."""
        row = torch.zeros(self.size)
        row[self.places[indices]] = self.signs[indices] / self.places.shape[1] ** 0.5
        return row


@dataclass(frozen=True)
class Rows:
    """Gradients of some canaries: (k, P) that is never held as a whole. numbers: (k,) of directions; norms: (k,)."""

    directions: Directions
    numbers: Tensor
    norms: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: "int | Tensor") -> Tensor:
        """(P,) of one place, or (n, P) of n places."""
        if isinstance(place, Tensor):
            return torch.stack([self[int(one)] for one in place])
        return self.directions.row(int(self.numbers[place])) * self.norms[place]


def draw(kind: Kind, count: int, parameters: int, rng: np.random.Generator) -> Directions:
    """`count` directions over `parameters` coordinates; `random` ones meet, the others do not."""
    if kind == "dirac":
        places = torch.from_numpy(rng.permutation(parameters)[:count]).unsqueeze(1)
        return Disjoint(places, torch.ones(places.shape), parameters)
    if count * parameters <= DENSE:
        drawn = rng.normal(size=(parameters, count)).astype(np.float32)
        columns = drawn / np.linalg.norm(drawn, axis=0) if kind == "random" else np.linalg.qr(drawn)[0]
        return Dense(torch.from_numpy(np.ascontiguousarray(columns.T)))
    if kind == "random":
        vectors = np.empty((count, parameters), dtype=np.float32)
        for row in vectors:  # one at a time: in float64 all of them would take twice the room
            row[:] = rng.standard_normal(parameters, dtype=np.float32)
            row /= np.linalg.norm(row)
        return Dense(torch.from_numpy(vectors))
    width = parameters // count
    places = torch.from_numpy(rng.permutation(parameters)[: count * width].reshape(count, width))
    signs = torch.from_numpy(rng.integers(0, 2, (count, width), dtype=np.int8) * 2 - 1)
    return Disjoint(places, signs, parameters)
