"""Time of a step before it is run: bytes over bandwidth, operations over rate, launches on the host.

    step = max((weights + KV bytes) / (bandwidth x MEMORY_SHARE), operations / (rate x COMPUTE_SHARE), host)

A CPU's rates are measured where it is planned for, so its shares are 1. Shares of cards and host times are other
people's measurements, named below; `plan --check` holds a prediction against the machine at hand.
"""

from dataclasses import dataclass

from hf_kvopt.plan.devices import Device
from hf_kvopt.plan.weights import Weights

# Of the datasheet: an H200 reaches 4.3 of 4.8 TB/s on a copy; good decode kernels 85 to 92 % of a copy.
MEMORY_SHARE = 0.8
# Large bf16 products reach 60 to 75 % of the datasheet under PyTorch.
COMPUTE_SHARE = 0.6
# An eager step waits for the host: 25.5 tokens/s for a 7B model of 32 layers on an A100, 107 when it is compiled
# (https://pytorch.org/blog/accelerating-generative-ai-2/): 1.2 ms a layer there, less on newer hosts.
EAGER_GPU_SECONDS_PER_LAYER = 1.2e-3
# What the compiled step of that report takes beyond its bytes.
COMPILED_GPU_SECONDS_PER_LAYER = 4e-5
# Python and dispatch of one layer's operations on a CPU: a step of the bundled model of 8 layers takes 2.9 ms at short
# context (evals.why, 2 cores with AVX512), of which its 28 MB of weights take 0.4.
EAGER_CPU_SECONDS_PER_LAYER = 0.3e-3
# How much faster than native a quantized decode can get however few its bytes, because instructions limit it: read
# from compiled machine code, not measured (docs/notes/gpu-predictions.md).
MOST_SPEEDUP = {"int8": 1.6, "fp8_e4m3": 1.5, "fp8_e5m2": 1.5, "k8v4": 1.7, "int4": 1.75}


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """What the steps of one model on one device cost.

    Args:
        device: where it runs.
        weights: of the model.
        num_layers: of the decoder.
        attention_flops: operations of attention for one query over one token of context, over all layers.
    """

    device: Device
    weights: Weights
    num_layers: int
    attention_flops: int

    def decode(
        self,
        batch: int,
        context: int,
        kv_bytes: float,  # that a step reads, of all rows, as if native
        speedup: float = 1.0,  # of reading them quantized
        copies: float = 0.0,  # KV bytes that the cache moves besides, in units of kv_bytes
        tokens_per_row: int = 1,  # more than one: a draft is verified
        is_compiled: bool = False,
    ) -> float:
        """Return the seconds of one step over the whole batch."""
        num_tokens = batch * tokens_per_row
        moved = self.weights.bytes_read(num_tokens) + kv_bytes * (1 / speedup + copies)
        work = num_tokens * (2 * self.weights.num_active + self.attention_flops * context)
        device = max(moved / self._bandwidth, work / self._flops)
        if not self.device.is_gpu:
            return device + self.num_layers * EAGER_CPU_SECONDS_PER_LAYER
        if is_compiled:
            return device + self.num_layers * COMPILED_GPU_SECONDS_PER_LAYER
        return max(device, self.num_layers * EAGER_GPU_SECONDS_PER_LAYER)

    def prefill(self, batch: int, num_tokens: int, context: int) -> float:
        """Return the seconds until the first token, `num_tokens` of each row's `context` computed."""
        past = context - num_tokens
        pairs = num_tokens * past + num_tokens * num_tokens / 2
        work = batch * (num_tokens * 2 * self.weights.num_active + self.attention_flops * pairs)
        return max(self.weights.num_bytes / self._bandwidth, work / self._flops)

    @property
    def _bandwidth(self) -> float:
        return self.device.bandwidth * (MEMORY_SHARE if self.device.is_gpu else 1.0)

    @property
    def _flops(self) -> float:
        return self.device.flops * (COMPUTE_SHARE if self.device.is_gpu else 1.0)


def kv_speedup(format: str, native_bytes: float, stored_bytes: float) -> float:
    """Return how much faster a step reads its KV in `format`: by its bytes, as far as instructions allow."""
    return min(native_bytes / stored_bytes, MOST_SPEEDUP.get(format, 1.0)) if stored_bytes else 1.0
