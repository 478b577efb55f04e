"""Chat completions: drawn lengths and arrivals, a few system prompts, some requests with several samples."""

import math
import random
from typing import NamedTuple

MAX_PROMPT, MAX_OUTPUT = 3072, 1024
SYSTEM_PROMPTS = (384, 512, 768, 1024)


class Request(NamedTuple):
    """One chat completion."""

    number: int
    arrival: int  # step
    system: int | None  # index of its system prompt
    prompt_len: int  # with the system prompt
    output_lens: tuple[int, ...]  # of each sample

    @property
    def prompt(self) -> list[int]:
        """Token ids: a system prompt has equal ids in each request, all other ids are unique."""
        own = [-(self.number * MAX_PROMPT + i) - 1 for i in range(self.prompt_len)]
        if self.system is None:
            return own
        shared = [self.system * MAX_PROMPT + i for i in range(SYSTEM_PROMPTS[self.system])]
        return shared + own[len(shared) :]


def draw(num_requests: int, seed: int, arrivals_per_step: float) -> list[Request]:
    """Draw requests with log-normal lengths, typical of chats, and Poisson arrivals."""
    rng = random.Random(seed)
    requests, clock = [], 0.0
    for number in range(num_requests):
        clock += rng.expovariate(arrivals_per_step)
        system = rng.choice([None, None, *range(len(SYSTEM_PROMPTS))])
        own = min(MAX_PROMPT - max(SYSTEM_PROMPTS), 1 + int(rng.lognormvariate(math.log(250), 1.0)))
        samples = 4 if rng.random() < 0.1 else 1
        outputs = tuple(min(MAX_OUTPUT, 1 + int(rng.lognormvariate(math.log(180), 0.8))) for _ in range(samples))
        length = own + (0 if system is None else SYSTEM_PROMPTS[system])
        requests.append(Request(number, int(clock), system, length, outputs))
    return requests
