"""Storage formats of keys and values: frozen descriptors and the registry that names them.

A format defines how one vector of `dim` channels (one token, one KV head) becomes bytes:

    codes[c] = round(x[c] / scale)        scale = absmax(x) / qmax, one per token and KV head (int4: two)

so that each token is quantized once, independently of its neighbours. `native` stores the computed values. `int4` packs
two channels to a byte: the low nibble holds the even channel, the high nibble the odd one, each as code + 8, so that no
sign has to be extended on reading.

int4 uses -8..7 with a *signed* scale that maps the largest magnitude to exactly -8 (llama.cpp's q4_0), or to -7.5, -8.5
or -9 (then clamped to -8), whichever gives the smallest error for the vector. Compared with -7..7, the first alone
lowers the mean squared error by 22 % on Gaussian, Laplace and Student-t channels (dim 64 and 128, 200,000 vectors
each, torch on a CPU), the choice by another 8 % on the reference model's keys and values; the price is an error of up
to 2 steps instead of half a step for channels at the ends. Even and odd channels have a scale each: a group of 32
channels at head_dim 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_kvopt.errors import nearest
from hf_kvopt.quant.sealed_formats import SEALED, SealedKV


@dataclass(frozen=True, kw_only=True)
class Format:
    """Storage of one vector of channels; hashable, so that it can be part of a compile key."""

    name: str
    bits: int | None  # per channel; None: the dtype that the model computes in
    code_dtype: torch.dtype | None  # element type of the pool; None: the model's own
    qmax: float  # the code of the largest magnitude
    codes_per_byte: int = 1
    mantissa_bits: int | None = None  # of a float code; None for integers
    min_exponent: int = 0  # of the smallest normal float code
    min_capability: tuple[int, int] | None = None  # CUDA compute capability that the kernels need

    @property
    def has_scale(self) -> bool:
        """Return whether a scale for each token and KV head is stored beside the codes."""
        return self.code_dtype is not None

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales of one vector: one scale, or one for each channel of a byte."""
        return (self.codes_per_byte,) if self.codes_per_byte > 1 else ()

    def packed_dim(self, dim: int) -> int:
        """Return the length of the pool's last axis for `dim` channels; raises ValueError if it cannot pack."""
        if dim % self.codes_per_byte:
            raise ValueError(
                f"head_dim must be a multiple of {self.codes_per_byte} for {self.name}: got {dim}; "
                "use int8, which stores one channel to a byte"
            )
        return dim // self.codes_per_byte

    def __reduce__(self) -> tuple[Callable[[str], Format], tuple[str]]:
        # A copy is the descriptor itself, as formats are compared by identity.
        return get_format, (self.name,)

    def bytes_per_vector(self, dim: int, native_dtype: torch.dtype, scale_dtype: torch.dtype) -> int:
        """Return the bytes of one token's vector of one KV head, scale included."""
        if self.code_dtype is None:
            return dim * native_dtype.itemsize
        return self.packed_dim(dim) * self.code_dtype.itemsize + self.codes_per_byte * scale_dtype.itemsize


NATIVE = Format(name="native", bits=None, code_dtype=None, qmax=1.0)
INT8 = Format(name="int8", bits=8, code_dtype=torch.int8, qmax=127.0)
FP8_E4M3 = Format(
    name="fp8_e4m3",
    bits=8,
    code_dtype=torch.float8_e4m3fn,
    qmax=448.0,
    mantissa_bits=3,
    min_exponent=-6,
    min_capability=(8, 9),
)
# 448 instead of e5m2's 57,344: headroom costs a float format nothing, and scales of ordinary keys and values then stay
# within float16's normal range.
FP8_E5M2 = Format(name="fp8_e5m2", bits=8, code_dtype=torch.float8_e5m2, qmax=448.0, mantissa_bits=2, min_exponent=-14)
INT4 = Format(name="int4", bits=4, code_dtype=torch.uint8, qmax=8.0, codes_per_byte=2)

FORMATS: dict[str, Format] = {f.name: f for f in (NATIVE, INT8, FP8_E4M3, FP8_E5M2, INT4)}


# float16 scales lose as much as float32 ones to four digits, and int8 at head_dim 64 stays below 0.53 of bfloat16.
SCALE_DTYPE = torch.float16


@dataclass(frozen=True)
class KVFormat:
    """Formats of the keys and the values of a layer, which may differ.

    `k` and `v` are those of single tokens. Where `sealed` is given, full blocks are stored as it says, and tokens of
    other blocks as the model computed them.
    """

    k: Format
    v: Format
    guard: bool = True  # coarse keys are guarded against loud channels; see `quant.guard`
    sealed: SealedKV | None = None

    @property
    def name(self) -> str:
        """Name as a user writes it: one name, or key/value."""
        for name, known in KV_FORMATS.items():
            if (known.k, known.v, known.sealed) == (self.k, self.v, self.sealed):
                return name
        return f"{self.k.name}/{self.v.name}"

    @property
    def is_native(self) -> bool:
        """Return whether both are stored as the model computes them."""
        return self.sealed is None and not (self.k.has_scale or self.v.has_scale)


# int4 of single tokens has no name of its own but the pair "int4/int4": sealed, it loses a twentieth.
KV_FORMATS: dict[str, KVFormat] = {
    **{fmt.name: KVFormat(fmt, fmt) for fmt in (NATIVE, INT8, FP8_E4M3, FP8_E5M2)},
    **{name: KVFormat(NATIVE, NATIVE, sealed=sealed) for name, sealed in SEALED.items()},
}
"""Formats of a layer by name, as caches, commands and evals take them."""
NATIVE_KV = KV_FORMATS["native"]


def get_kv_format(name: str) -> KVFormat:
    """Return the pair called `name`, or "key/value" such as "fp8_e4m3/int4", both of single tokens.

    Raises:
        ValueError: an unknown name; lists the known.
    """
    if isinstance(name, str) and name in KV_FORMATS:
        return KV_FORMATS[name]
    parts = name.split("/") if isinstance(name, str) else []
    if isinstance(name, str) and is_pair(name):
        return KVFormat(FORMATS[parts[0]], FORMATS[parts[1]])
    if len(parts) == 2:
        hint = nearest(next(part for part in parts if part not in FORMATS), FORMATS)
    else:
        hint = nearest(name, KV_FORMATS)
    raise ValueError(
        f"format must be one of {', '.join(KV_FORMATS)}, or a pair for keys and values such as 'int8/int4': "
        f"got {name!r}{hint}"
    )


def is_pair(name: str) -> bool:
    """Return whether `name` is a pair of formats of single tokens, "keys/values"."""
    parts = name.split("/")
    return len(parts) == 2 and all(part in FORMATS for part in parts)


# What has no blocks to seal, for `require_unsealed`.
LATENTS = "latent attention"


def require_unsealed(format: KVFormat, what: str) -> None:
    """Raise ValueError where `format` seals blocks, and `what` has none to seal."""
    if format.sealed is not None:
        raise ValueError(
            f"{what} stores each token by itself: got format {format.name!r}, which seals whole blocks; use 'int8', or "
            "a pair for keys and values such as 'int8/int4' or 'int4/int4', which loses more than blocks do"
        )


def get_format(name: str) -> Format:
    """Return the format called `name`; raises ValueError that lists the known ones."""
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}: got {name!r}{nearest(name, FORMATS)}")
    return FORMATS[name]


def format_of(pool_dtype: torch.dtype) -> Format:
    """Return the format that a pool of this element type holds; raises TypeError for any other type."""
    for fmt in FORMATS.values():
        if fmt.code_dtype == pool_dtype:
            return fmt
    if pool_dtype in (torch.float16, torch.bfloat16, torch.float32):
        return NATIVE
    known = ", ".join(str(f.code_dtype) for f in FORMATS.values() if f.code_dtype is not None)
    raise TypeError(f"pool dtype must be float16, bfloat16, float32 or one of {known}: got {pool_dtype}")
