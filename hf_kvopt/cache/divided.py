"""Models that are divided over ranks: which divisions a cache follows.

tensor parallel    each rank has some heads of every layer, and keeps keys and values of these: followed
pipeline           each rank has some layers, and its cache would count tokens of layers that it never sees: refused
"""

from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_kvopt.cache.whole import require_undivided_layers
from hf_kvopt.compat.ranks import text_group
from hf_kvopt.errors import UnsupportedModel


def require_followed(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel, on every rank, for a model divided in a way that no cache of this library follows."""
    require_undivided_layers(model.config)
    group = text_group(model)
    if group is None:
        return
    for name, module in model.named_modules():
        weight, head_dim = getattr(getattr(module, "k_proj", None), "weight", None), getattr(module, "head_dim", None)
        if not isinstance(weight, DTensor) or not isinstance(head_dim, int):
            continue
        is_divided = weight.to_local().shape != weight.shape
        if is_divided and weight.shape[0] % (head_dim * group.size()):
            raise UnsupportedModel(
                f"each rank keeps whole heads of keys and values: got {weight.shape[0] // head_dim} heads in {name} of "
                f"{type(model).__name__} over {group.size()} ranks; use a number of ranks that divides the heads"
            )
