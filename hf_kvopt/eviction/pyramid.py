"""PyramidKV: budgets that shrink from the first layer to the last, each filled as SnapKV does (arXiv:2406.02069).

    layer 0      [ most                          ][ window ]      most + fewest = twice the budget of SnapKV
    ...          [ in between         ][ window ]                 so that all layers together hold as much
    last layer   [ fewest ][ window ]

Attention spreads over the whole text in early layers and settles on few tokens in late ones. Layers hold unlike counts,
so each has a block table of its own.
"""

from dataclasses import dataclass, field, replace

from hf_kvopt.eviction.scores import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Keep what `SnapKV` keeps, but more of it in early layers than in late ones.

    Args:
        keep: share of the prompt's tokens that each KV head keeps, on average over the layers.
        window: see `SnapKV`.
        kernel: see `SnapKV`.
        slope: how many times more than the last layer a layer of average budget keeps beyond the window, at least 1.

    Raises:
        ValueError: a share, window, kernel or slope that cannot work; a cache without the model's config.

    Source: PyramidKV, arXiv:2406.02069, with the budgets of kvpress' PyramidKVPress.
    """

    slope: int = 20
    place: tuple[int, int] | None = field(default=None, repr=False)  # layer, layers; set by `at`

    by_layer = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.slope, int) or isinstance(self.slope, bool) or self.slope < 1:
            raise ValueError(f"slope must be a whole number of at least 1: got {self.slope!r}; 20 is usual")

    def at(self, layer_idx: int, num_layers: int) -> "PyramidKV":
        return replace(self, place=(layer_idx, num_layers))

    def budget(self, length: int) -> int:
        average = super().budget(length)
        if self.place is None or self.place[1] < 2 or average >= length:
            return average
        layer_idx, num_layers = self.place
        beyond = average - self.window
        fewest = beyond // self.slope
        most = 2 * beyond - fewest
        if most > length - self.window:
            most = length - self.window
            fewest = 2 * beyond - most
        return self.window + round(most - layer_idx * (most - fewest) / (num_layers - 1))
