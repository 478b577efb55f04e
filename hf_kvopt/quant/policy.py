"""Format of each layer: one default, with exceptions by position or kind.

    layer_formats  >  skip_layers  >  format

Layers are numbered as in the cache. "first" and "last" are the first and the last layer with keys and values,
"sliding" all layers with a window.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from hf_kvopt.quant.formats import NATIVE_KV, KVFormat, get_kv_format
from hf_kvopt.quant.sealed_formats import SEALED_BLOCK

GUARDS = ("auto", "off")
PLACES = ("first", "last", "sliding")
PLAIN_BLOCK = 16  # tokens a block of layers that store each token by itself
LayerName = int | str


@dataclass(frozen=True, kw_only=True)
class FormatPolicy:
    """Formats of all layers of a cache.

    Args:
        format: format of all layers without an exception; see `get_kv_format`.
        skip_layers: layers that stay native: numbers (negative from the end), "first", "last", "sliding". Sliding
            layers by default: their window limits their size, so there is little to save.
        layer_formats: formats of single layers, by the same names; a number takes precedence over a position.
        guard: "auto" centres and rotates coarse keys where loud channels would ruin them, "off" never does; see
            `quant.guard`.
        exact_prefill: let the first prompt attend to its own states before they are quantized.

    Raises:
        ValueError: an unknown format or layer name.
    """

    format: str = "native"
    skip_layers: Collection[LayerName] = ("sliding",)
    layer_formats: Mapping[LayerName, str] = field(default_factory=dict)
    guard: str = "auto"
    exact_prefill: bool = False

    def __post_init__(self) -> None:
        get_kv_format(self.format)
        if self.guard not in GUARDS:
            raise ValueError(f"guard must be one of {', '.join(GUARDS)}: got {self.guard!r}")
        if isinstance(self.skip_layers, str) or not isinstance(self.skip_layers, Collection):
            raise ValueError(
                f"skip_layers must be several layers, such as ('first', 'last') or (0, 5): got {self.skip_layers!r}; "
                "put it in a tuple, or pass () for none"
            )
        if not isinstance(self.layer_formats, Mapping):
            raise ValueError(
                "layer_formats must map layers to formats, such as {'first': 'int8', 5: 'native'}: got "
                f"{self.layer_formats!r}"
            )
        if not isinstance(self.exact_prefill, bool):
            raise ValueError(f"exact_prefill must be True or False: got {self.exact_prefill!r}")
        for name in (*self.skip_layers, *self.layer_formats):
            if name not in PLACES and (not isinstance(name, int) or isinstance(name, bool)):
                raise ValueError(f"a layer must be a number or one of {', '.join(PLACES)}: got {name!r}")
        for name in self.layer_formats.values():
            get_kv_format(name)

    @property
    def needs_layer_count(self) -> bool:
        """Return whether a layer is named from the end, so that the number of layers must be known."""
        names = (*self.skip_layers, *self.layer_formats)
        return any(name == "last" or (isinstance(name, int) and name < 0) for name in names)

    def resolve(self, num_layers: int, first: int, last: int) -> "FormatPolicy":
        """Return this policy with numbers in place of "first", "last" and negative numbers.

        Args:
            num_layers: layers of the cache.
            first: number of the first layer that holds keys and values.
            last: number of the last layer that holds keys and values.

        Raises:
            ValueError: a layer does not exist.
        """
        names = {name: _number(name, num_layers, first, last) for name in (*self.skip_layers, *self.layer_formats)}
        # Positions first, so that numbers override them.
        ordered = sorted(self.layer_formats.items(), key=lambda item: isinstance(item[0], int))
        return replace(
            self,
            skip_layers=tuple(names[name] for name in self.skip_layers),
            layer_formats={names[name]: fmt for name, fmt in ordered},
        )

    def at(self, layer_idx: int, is_sliding: bool) -> KVFormat:
        """Return the format of one layer; a policy that names layers from the end must be resolved first."""
        names: list[LayerName] = [layer_idx, *(["first"] if layer_idx == 0 else []), *(["sliding"] * is_sliding)]
        for name in names:
            if name in self.layer_formats:
                return self._guarded(self.layer_formats[name])
        if any(name in self.skip_layers for name in names):
            return NATIVE_KV
        return self._guarded(self.format)

    def seals(self, is_sliding: bool) -> bool:
        """Return whether some layer, with a window or without, may seal its blocks."""
        names = set(self.layer_formats.values())
        if not (is_sliding and "sliding" in self.skip_layers):
            names.add(self.format)
        return any(get_kv_format(name).sealed is not None for name in names)

    def block_size(self) -> int:
        """Return the tokens of a block where nobody chose: more where blocks are sealed."""
        return SEALED_BLOCK if self.seals(is_sliding=False) or self.seals(is_sliding=True) else PLAIN_BLOCK

    def _guarded(self, format: str) -> KVFormat:
        return replace(get_kv_format(format), guard=self.guard == "auto")


def _number(name: LayerName, num_layers: int, first: int, last: int) -> LayerName:
    if name == "sliding":
        return name
    number = {"first": first, "last": last}.get(str(name), name)
    assert isinstance(number, int)
    if not -num_layers <= number < num_layers:
        raise ValueError(f"layer {name} does not exist: got a model of {num_layers} layers")
    return number % num_layers
