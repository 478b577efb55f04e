"""A short generation on every cache, compared with transformers' own: the end-to-end trial of `doctor`.

`doctor` also runs it as `python -m hf_kvopt.cli.trial` in a subprocess, where TRITON_INTERPRET=1 runs the kernels on a
CPU.
"""

import json
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_kvopt import compat
from hf_kvopt.enable import disable, enable
from hf_kvopt.errors import UnsupportedDevice
from hf_kvopt.overrides.cache_maker import CACHES

PROMPT_LEN, NEW_TOKENS = 14, 12  # across the border of a block of 16
# Arguments of `enable` by displayed name: each cache, then features on a paged one.
TRIALS: dict[str, dict[str, Any]] = {
    **{name: {"cache": name} for name in sorted(CACHES)},
    "paged, prefix sharing": {"cache": "paged", "prefix_sharing": True},
    "paged, speculation": {"cache": "paged", "draft": "prompt_lookup"},
}
FEW_TOKENS = 4  # for the slow interpreter; still across the border


class Trial(NamedTuple):
    """Result of one cache."""

    cache: str
    result: str  # "equal", "runs" (a lossy format, whose tokens may differ), "differs", "refused", or "fails"
    detail: str
    seconds: float


def run_trials(device: str, names: list[str] | None = None, new_tokens: int = NEW_TOKENS) -> list[Trial]:
    """Generate with each of `TRIALS`, in float32, from a random model of two layers."""
    model = _tiny_model(device)
    ids = torch.randint(3, 97, (2, PROMPT_LEN), generator=torch.Generator().manual_seed(0)).to(device)
    model.set_attn_implementation("eager")
    want = _generate(model, ids, new_tokens=new_tokens, **{compat.CACHE_KEYWORD: DynamicCache(config=model.config)})
    return [_trial(model, ids, want, name, new_tokens) for name in (names if names is not None else TRIALS)]


def _tiny_model(device: str) -> Any:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    return model.to(device).eval()


def _generate(model: Any, ids: Tensor, new_tokens: int, **options: Any) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **options)


def _trial(model: Any, ids: Tensor, want: Tensor, name: str, new_tokens: int) -> Trial:
    start = time.perf_counter()
    try:
        enable(model, **TRIALS.get(name, {"cache": name}))
        got = _generate(model, ids, new_tokens)
        same = int((got == want)[:, PROMPT_LEN:].sum())
        total = want[:, PROMPT_LEN:].numel()
        is_equal = got.equal(want)
        result = "equal" if is_equal else "differs" if name.startswith("paged") else "runs"
        detail = f"{same} of {total} tokens as transformers'"
    except UnsupportedDevice as error:
        result, detail = "refused", str(error)
    except Exception as error:  # a doctor reports whatever is broken
        result, detail = "fails", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    finally:
        disable(model)
    return Trial(name, result, detail, time.perf_counter() - start)


def main(argv: list[str] | None = None) -> int:
    """Run the trials named on the command line on a CPU and print them as JSON."""
    names = sys.argv[1:] if argv is None else argv
    print(json.dumps([trial._asdict() for trial in run_trials("cpu", names or None, FEW_TOKENS)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
