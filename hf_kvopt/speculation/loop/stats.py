"""Statistics of speculation: accepted lengths, times, and whether it fell back to plain decoding."""

from dataclasses import dataclass, field


@dataclass
class SpeculationStats:
    """Counts over all calls of one `speculative(...)`; times in seconds."""

    calls: int = 0
    steps: int = 0  # verifications
    row_steps: int = 0  # verifications times rows
    tokens: int = 0  # given by verifications, the target's own tokens included
    plain_steps: int = 0  # steps without a draft
    plain_tokens: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    plain_s: float = 0.0
    time_saved_s: float = 0.0  # compared with plain steps for the same tokens, once one was timed
    fell_back: bool = False  # plain decoding was faster, at least for a while
    proposed_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens of a row that a verification gives, the target's own token included."""
        return self.tokens / self.row_steps if self.row_steps else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of the drafts of at least k + 1 tokens of which k + 1 or more were accepted, for each k."""
        return [a / p if p else 0.0 for a, p in zip(self.accepted_by_depth, self.proposed_by_depth, strict=True)]

    def note_verification(self, depths: list[tuple[int, int]], tokens: int, seconds: float) -> None:
        """Note a verification that gave `tokens`; `depths` holds (drafted, accepted) of each row."""
        self.steps += 1
        self.row_steps += len(depths)
        self.tokens += tokens
        self.verify_s += seconds
        for proposed, accepted in depths:
            missing = proposed - len(self.proposed_by_depth)
            self.proposed_by_depth += [0] * missing
            self.accepted_by_depth += [0] * missing
            for depth in range(proposed):
                self.proposed_by_depth[depth] += 1
                self.accepted_by_depth[depth] += depth < accepted

    def note_plain(self, tokens: int, seconds: float) -> None:
        """Note a step without a draft."""
        self.plain_steps += 1
        self.plain_tokens += tokens
        self.plain_s += seconds
