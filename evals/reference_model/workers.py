"""Gradients from several threads that take pieces of a batch from one queue.

On a shared CPU one operator split over two threads waits for the slower core. Here each thread runs whole pieces alone,
on a replica that shares the model's weights and has its own gradients, so that a busy core only delays its own share.
With one worker this is plain gradient accumulation.
"""

import copy
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM


def mean_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Return the mean cross entropy of the next tokens in `[rows, row_len + 1]`, under bf16 autocast."""
    with torch.autocast(rows.device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


class GradientWorkers:
    """Owns the replicas and their threads; between calls the replicas hold no gradients."""

    def __init__(self, model: LlamaForCausalLM, num_workers: int, *, compiled: bool) -> None:
        self._replicas = [model]
        for _ in range(num_workers - 1):
            replica = copy.deepcopy(model)
            for own, shared in zip(replica.parameters(), model.parameters(), strict=True):
                own.data = shared.data
            self._replicas.append(replica)
        torch._dynamo.config.recompile_limit = 8 * num_workers
        self._loss = torch.compile(mean_loss, dynamic=False) if compiled else mean_loss
        threads = None if num_workers == 1 else 1
        self._pools = [ThreadPoolExecutor(1, initializer=_set_threads, initargs=(threads,)) for _ in self._replicas]
        self._compiled_shapes: set[torch.Size] = set()

    def backward(self, pieces: list[Tensor]) -> float:
        """Return the mean loss over equally large pieces, and leave its gradient in the model."""
        if pieces[0].shape not in self._compiled_shapes:
            self._compiled_shapes.add(pieces[0].shape)
            for pool, replica in zip(self._pools, self._replicas, strict=True):
                pool.submit(self._drain, replica, deque(pieces[:1]), 1).result()
                replica.zero_grad(set_to_none=True)
        queue = deque(pieces)
        jobs = [
            pool.submit(self._drain, replica, queue, len(pieces))
            for pool, replica in zip(self._pools, self._replicas, strict=True)
        ]
        loss = sum(job.result() for job in jobs)
        for replica in self._replicas[1:]:
            for total, part in zip(self._replicas[0].parameters(), replica.parameters(), strict=True):
                if part.grad is not None:
                    total.grad = part.grad if total.grad is None else total.grad.add_(part.grad)
            replica.zero_grad(set_to_none=True)
        return loss

    def _drain(self, replica: LlamaForCausalLM, queue: deque[Tensor], num_pieces: int) -> float:
        """Process pieces until the queue is empty; return this worker's share of the mean loss."""
        total = 0.0
        while True:
            try:
                rows = queue.popleft()
            except IndexError:
                return total
            loss = self._loss(replica, rows) / num_pieces
            loss.backward()
            total += loss.item()


def _set_threads(num_threads: int | None) -> None:
    if num_threads is not None:
        torch.set_num_threads(num_threads)
