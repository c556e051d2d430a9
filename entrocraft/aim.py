"""Where the entropy of a batch stands in its band, and the change that would bring it to the schedule."""

from typing import NamedTuple

from entrocraft.bands import Band


class Aim(NamedTuple):
    """Where the entropy should be, nats, and the change that would bring it to the schedule's next value.

    direction: +1 with the entropy above the band, -1 below it, 0 inside, edges included.
    """

    entropy: float
    target: float
    low: float
    high: float
    direction: int
    need: float

    @staticmethod
    def of(edges: Band, step: int, entropy: float) -> "Aim":
        """Of a batch of that entropy at `step`; errors as `Band.target`."""
        low, high = edges(step)
        return Aim(
            entropy=entropy,
            target=edges.target(step),
            low=low,
            high=high,
            direction=int(entropy > high) - int(entropy < low),
            need=edges.target(step + 1) - entropy,
        )

    @property
    def place(self) -> str:
        """In words."""
        where = {1: "above", -1: "below", 0: "inside"}[self.direction]
        return f"entropy {self.entropy:.4f} nats {where} the band [{self.low:.4f}, {self.high:.4f}]"
