"""Cheap `generate()` for Hugging Face transformers: paged KV caches, attention over them, and what builds on both.

>>> import hf_kvopt
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="hf_kvopt")
>>> output = model.generate(**inputs, cache=hf_kvopt.PagedCache())

Importing registers the attention and its mask under "hf_kvopt", once, and touches nothing else.
"""

from hf_kvopt import plan
from hf_kvopt.attention.register import ATTENTION_NAME, register
from hf_kvopt.batching.batcher import Batcher
from hf_kvopt.batching.many import generate_many
from hf_kvopt.batching.request import Request, RequestStats
from hf_kvopt.batching.rules import TokenLogprob
from hf_kvopt.batching.settings import BatchConfig
from hf_kvopt.batching.stats import BatchStats
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.cache.quantized import QuantizedPagedCache
from hf_kvopt.cache.stats import CacheStats, PrefixStats
from hf_kvopt.calibration import Calibration, FormatLoss, calibrate, retrieval_heads
from hf_kvopt.compat import CACHE_KEYWORD
from hf_kvopt.config import CacheConfig
from hf_kvopt.enable import Enabled, disable, enable, enabled
from hf_kvopt.errors import CacheStateError, KVOptError, OutOfBlocks, UnsupportedDevice, UnsupportedModel
from hf_kvopt.eviction.expected import ExpectedAttention
from hf_kvopt.eviction.heads import DuoAttention
from hf_kvopt.eviction.hierarchical import Hierarchical
from hf_kvopt.eviction.policy import EvictionPolicy
from hf_kvopt.eviction.press import PressPolicy
from hf_kvopt.eviction.pyramid import PyramidKV
from hf_kvopt.eviction.quest import Quest
from hf_kvopt.eviction.recent import SinkRecent, SinkRecentPeriodic
from hf_kvopt.eviction.scores import TOVA, Knorm, PromptPolicy, SnapKV
from hf_kvopt.offline.completer import Completer
from hf_kvopt.overrides.sharing import prefix_store
from hf_kvopt.packaged import model_source, packaged_texts
from hf_kvopt.prefix.cache import PrefixSharedCache
from hf_kvopt.prefix.store import PrefixStore
from hf_kvopt.quant import KV_FORMATS
from hf_kvopt.speculation.drafters.suffix import SuffixLookup
from hf_kvopt.speculation.heads.auto import DraftHead
from hf_kvopt.speculation.loop.stats import SpeculationStats
from hf_kvopt.speculation.speculative import speculative

__version__ = "0.1.0"
__all__ = [
    "ATTENTION_NAME",
    "CACHE_KEYWORD",
    "KV_FORMATS",
    "TOVA",
    "BatchConfig",
    "BatchStats",
    "Batcher",
    "CacheConfig",
    "CacheStateError",
    "CacheStats",
    "Calibration",
    "Completer",
    "DraftHead",
    "DuoAttention",
    "Enabled",
    "EvictionPolicy",
    "ExpectedAttention",
    "FormatLoss",
    "Hierarchical",
    "KVOptError",
    "Knorm",
    "OutOfBlocks",
    "PagedCache",
    "PrefixSharedCache",
    "PrefixStats",
    "PrefixStore",
    "PressPolicy",
    "PromptPolicy",
    "PyramidKV",
    "QuantizedPagedCache",
    "Quest",
    "Request",
    "RequestStats",
    "SinkRecent",
    "SinkRecentPeriodic",
    "SnapKV",
    "SpeculationStats",
    "SuffixLookup",
    "TokenLogprob",
    "UnsupportedDevice",
    "UnsupportedModel",
    "calibrate",
    "disable",
    "enable",
    "enabled",
    "generate_many",
    "model_source",
    "packaged_texts",
    "plan",
    "prefix_store",
    "retrieval_heads",
    "speculative",
]

register()
