"""Names of transformers for models that are divided over ranks; the part of `compat` that few models need."""

from torch.distributed import ProcessGroup
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kvopt.compat import missing


def text_group(model: PreTrainedModel) -> ProcessGroup | None:
    """Return the group of ranks that read the same texts, each with a part of every layer; None for a whole model.

    Raises:
        UnsupportedModel: the model is sharded, and this transformers does not say over which ranks.
    """
    if int(getattr(model, "_tp_size", None) or 1) == 1:
        return None
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        missing("PreTrainedModel._device_mesh")
    mesh = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) and mesh.ndim > 1 else mesh
    if mesh.ndim != 1:
        missing("axis 'tp' of PreTrainedModel._device_mesh")
    group: ProcessGroup | None = mesh.get_group() if mesh.size() > 1 else None
    return group


def is_pipelined(config: PreTrainedConfig) -> bool:
    """Return whether `config` is of a model whose layers are divided over ranks, as `from_pretrained` notes in it."""
    divided = getattr(config, "distributed_config", None)
    size = divided.get("pp_size") if isinstance(divided, dict) else getattr(divided, "pp_size", None)
    return (size or 1) > 1
