"""TRL: some steps of GRPO with shared prefixes and with continuous batching earn the rewards of plain ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import hf_kvopt
from evals.reference_model import MODEL_PATH

trl = pytest.importorskip("trl", reason="pip install 'hf-kvopt[neighbours]'")
pytestmark = pytest.mark.usefixtures("one_thread")


def rewards_of(folder: Path, enable: dict[str, Any] | None, **settings: Any) -> tuple[list[float], list[str]]:
    """Train for three steps, and return the rewards and texts."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH, padding_side="left")
    if enable is not None:
        hf_kvopt.enable(model, **enable)
    texts: list[str] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        texts.extend(completions)
        return [float(completion.count(" ")) for completion in completions]

    options = trl.GRPOConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, num_generations=2, learning_rate=1e-3,
        max_completion_length=12, report_to=[], use_cpu=True, bf16=False, save_strategy="no", seed=0, top_k=1,
        logging_steps=1, **settings,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["import os\n", "def add(a, b):\n    return", "class Stack:\n", "for i in "]})
    trainer = trl.GRPOTrainer(model, reward, args=options, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry], texts


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[str]]:
    rewards, texts = rewards_of(tmp_path_factory.mktemp("plain"), None)
    assert len(set(rewards)) > 1
    return rewards, texts


def test_shared_prefixes_earn_the_same_rewards(plain: Any, tmp_path: Path) -> None:
    assert rewards_of(tmp_path, {"prefix_sharing": True}) == plain


def test_continuous_batching_earns_the_same_rewards(plain: Any, tmp_path: Path) -> None:
    settings = {"use_transformers_paged": True} if hasattr(trl.GRPOConfig, "use_transformers_paged") else None
    if settings is None:
        settings = {"use_transformers_continuous_batching": True}
    assert rewards_of(tmp_path, {"batching": True}, **settings) == plain
