"""Predicted time of a step: bytes over bandwidth, operations over rate, launches on the host.

    eager step = max((weights + KV bytes) / (bandwidth x MEMORY_SHARE), operations / (rate x COMPUTE_SHARE), host)
    compiled step, and any on a CPU: the host's time is added instead

The rates of a CPU are measured on the machine itself, so its shares are 1. Shares of GPUs and host times are published
measurements, cited below; `plan --check` compares a prediction with the current machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hf_kvopt.plan.devices import Device
from hf_kvopt.plan.geometry import LayerKV
from hf_kvopt.plan.layout import Layout
from hf_kvopt.plan.weights import Weights

# Share of the datasheet: an H200 reaches 4.3 of 4.8 TB/s on a copy; good decode kernels 85 to 92 % of a copy.
MEMORY_SHARE = 0.8
# Large bf16 products reach 60 to 75 % of the datasheet under PyTorch.
COMPUTE_SHARE = 0.6
# An eager step waits for the host: 25.5 tokens/s for a 7B model of 32 layers on an A100, 107 when it is compiled
# (https://pytorch.org/blog/accelerating-generative-ai-2/): 1.2 ms a layer there, less on newer hosts.
EAGER_GPU_SECONDS_PER_LAYER = 1.2e-3
# Time of the compiled step in that report beyond its bytes.
COMPILED_GPU_SECONDS_PER_LAYER = 4e-5
# Python and dispatch of one layer's operations on a CPU: a step of the bundled model of 8 layers takes 2.9 ms at short
# context (evals.why, 2 cores with AVX512), of which its 28 MB of weights take 0.4.
EAGER_CPU_SECONDS_PER_LAYER = 0.3e-3
# Limit on the speed-up of a quantized decode over native, set by instructions and not by bytes: read from compiled
# machine code, not measured (docs/notes/gpu-predictions.md).
MOST_SPEEDUP = {"int8": 1.6, "fp8_e4m3": 1.5, "fp8_e5m2": 1.5, "k8v4": 1.7, "int4": 1.75}


class Step(NamedTuple):
    """Parts of the time of one forward, in seconds."""

    bytes_s: float  # reading weights, keys and values
    work_s: float  # arithmetic
    host_s: float  # launching from the host
    is_beside: bool  # the host launches while the device works, else before it

    @property
    def device_s(self) -> float:
        """Seconds of the device alone."""
        return max(self.bytes_s, self.work_s)

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return max(self.device_s, self.host_s) if self.is_beside else self.device_s + self.host_s

    @property
    def waits_for_host(self) -> bool:
        """Return whether the device finishes before the host has launched the next step."""
        return self.is_beside and self.host_s > self.device_s

    @property
    def limit(self) -> str:
        """Name of the resource that bounds the step."""
        return "the host" if self.waits_for_host else "arithmetic" if self.work_s > self.bytes_s else "memory"


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """Time model of the steps of one model on its devices.

    Args:
        device: the device, or one of several equal ones.
        weights: weights of the model.
        layers: layers of its decoder.
        layout: placement of the model on devices.
        itemsize: bytes of a number in the dtype of the model.
    """

    device: Device
    weights: Weights
    layers: Sequence[LayerKV]
    layout: Layout
    itemsize: int = 2

    def decode(
        self,
        batch: int,
        context: int,
        kv_bytes: float,  # native bytes that a step reads, over all rows
        speedup: float = 1.0,  # of a quantized read over a native one
        copies: float = 0.0,  # KV bytes that the cache moves besides, in units of kv_bytes
        tokens_per_row: int = 1,  # more than one when a draft is verified
        is_compiled: bool = False,
        expands: bool = False,  # latents are expanded to keys and values of all heads, written and read again
    ) -> Step:
        """Return the time of one step of the whole batch, whose rows hold `context` tokens."""
        num_tokens = batch * tokens_per_row
        kv_moved = kv_bytes / self.layout.kv_parts * (1 / speedup + copies)
        if expands:
            kv_moved += 2 * batch * context * self.itemsize * sum(x.expanded_width for x in self._latent_layers)
        moved = self.weights.bytes_read(num_tokens, self._divisor) + kv_moved
        work = num_tokens * (2 * self._num_active + self._attention_work(context, context - 1, expands))
        if expands:
            work += batch * context * sum(layer.expansion_flops for layer in self._latent_layers)
        return self._step(moved, work, is_compiled)

    def prefill(self, batch: int, num_tokens: int, context: int) -> Step:
        """Return the time until the first token, with the last `num_tokens` of each row's `context` computed."""
        attention = self._attention_work(context, context - num_tokens, expands=True) * num_tokens
        expansion = context * sum(layer.expansion_flops for layer in self._latent_layers)
        work = batch * (num_tokens * 2 * self._num_active + attention + expansion)
        return self._step(self.weights.bytes_read(batch * num_tokens, self._divisor), work, is_compiled=False)

    @property
    def _latent_layers(self) -> list[LayerKV]:
        return [layer for layer in self.layers if layer.attention == "MLA"]

    def _step(self, moved: float, work: float, is_compiled: bool) -> Step:
        seconds = moved / self._bandwidth, work / self._flops
        if not self.device.is_gpu:
            return Step(*seconds, len(self.layers) * EAGER_CPU_SECONDS_PER_LAYER, False)
        # A replayed graph runs its launches one after the other; an eager host launches while the device works.
        a_layer = COMPILED_GPU_SECONDS_PER_LAYER if is_compiled else EAGER_GPU_SECONDS_PER_LAYER
        return Step(*seconds, len(self.layers) * a_layer, not is_compiled)

    def _attention_work(self, stop: int, start: int, expands: bool) -> float:
        """Return the mean operations of attention for one query of the columns `start` to `stop`."""
        work = 0.0
        for layer in self.layers:
            if not layer.has_kv:
                continue
            # A query at column t sees t + 1 columns, or its window.
            window = min(layer.window or stop, stop)
            rising = max(0, min(stop, window) - start)
            seen = rising * (start + min(stop, window) + 1) / 2 + (stop - start - rising) * window
            per_pair = 2 * layer.expanded_width if expands else layer.flops_per_pair
            work += per_pair * seen / (stop - start) / self.layout.kv_parts
        return work

    @property
    def _divisor(self) -> int:
        """Number of devices that each matrix is divided over."""
        return self.layout.count if self.layout.is_divided else 1

    @property
    def _num_active(self) -> float:
        """Parameters that one token is multiplied with on each device."""
        dense, expert = self.weights.dense, self.weights.expert
        routed = expert.num * self.weights.expert_share * expert.share(self._divisor)
        return dense.num * dense.share(self._divisor) + routed

    @property
    def _bandwidth(self) -> float:
        return self.device.bandwidth * (MEMORY_SHARE if self.device.is_gpu else 1.0)

    @property
    def _flops(self) -> float:
        return self.device.flops * (COMPUTE_SHARE if self.device.is_gpu else 1.0)


def kv_speedup(format: str, native_bytes: float, stored_bytes: float) -> float:
    """Return the speed-up of reading KV in `format`: by its bytes, limited by instructions."""
    return min(native_bytes / stored_bytes, MOST_SPEEDUP.get(format, 1.0)) if stored_bytes else 1.0
