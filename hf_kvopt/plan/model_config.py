"""Config of a model from a hub id, folder, config.json or object; nothing but the config is downloaded."""

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_kvopt.plan.inputs import BadInput

# Without one of these a config would silently get its class's default: the arithmetic of another model.
_NEEDED = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}
# A typing error: building this many layers would take minutes.
_MOST_LAYERS = 10_000
_EXAMPLE = 'a hub id such as "meta-llama/Llama-3.1-8B", a folder, or a config.json'


def load_config(model: Any) -> PreTrainedConfig:
    """Return the config of `model`: a hub id, a folder, a config.json, its fields, a config, or a model.

    Raises:
        BadInput: it does not exist, has an unknown model_type, or lacks a required field.
    """
    if isinstance(model, PreTrainedConfig):
        return model
    if isinstance(getattr(model, "config", None), PreTrainedConfig):
        return model.config
    if isinstance(model, Mapping):
        return _from_fields(dict(model), "the config")
    if not isinstance(model, str | os.PathLike) or not str(model):
        raise BadInput(f"model must be {_EXAMPLE}: got {model!r}")
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _from_fields(_read(path), str(path))
    if path.suffix == ".json" or str(model).startswith((".", "~", os.sep)) or str(model).count("/") > 1:
        raise BadInput(f"no config at {str(model)!r}: expected {_EXAMPLE}")
    return _from_fields(_from_hub(str(model)), str(model))


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is no config: expected a JSON object, {error}") from error
    if not isinstance(fields, dict):
        raise BadInput(f'{path} is no config: expected a JSON object such as {{"model_type": "llama", ...}}')
    return fields


def _from_hub(name: str) -> dict[str, Any]:
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot get the config of {name!r}: {_first_line(error)} Expected {_EXAMPLE}") from error
    if not fields:
        raise BadInput(f"{name!r} has no config.json: expected {_EXAMPLE}")
    return fields


def _from_fields(fields: dict[str, Any], where: str) -> PreTrainedConfig:
    kind = fields.pop("model_type", None)
    if kind is None:
        raise BadInput(f'{where} has no field model_type: expected for example "model_type": "llama"')
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=3, cutoff=0.4)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise BadInput(f"{where}: model_type {kind!r} is unknown to this transformers{hint}")
    _require_fields(CONFIG_MAPPING[kind], fields, where)
    for part in (fields, fields.get("text_config")):
        _require_numbers(part if isinstance(part, Mapping) else {}, where)
    try:
        return AutoConfig.for_model(kind, **fields)
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise BadInput(f"{where} is no valid {kind} config: {_first_line(error)}") from error
    except Exception as error:  # transformers' strict dataclasses raise errors of huggingface_hub's own
        raise BadInput(f"{where} is no valid {kind} config: {' '.join(str(error).split())[:200]}") from error


def _require_fields(config_class: type[PreTrainedConfig], fields: Mapping[str, Any], where: str) -> None:
    # Composite configs hold these fields in a sub-config, on whose defaults published configs rely.
    if config_class.sub_configs:
        return
    names = config_class.attribute_map
    known = set(getattr(config_class, "__dataclass_fields__", ()))
    for name, example in _NEEDED.items():
        written = names.get(name, name)
        if written in known and fields.get(written) is None and fields.get(name) is None:
            raise BadInput(f'{where} has no field {written}: expected for example "{written}": {example}')


def _require_numbers(fields: Mapping[str, Any], where: str) -> None:
    """Check the fields on which transformers would fail without naming them."""
    for name, example in _NEEDED.items():
        value, most = fields.get(name), _MOST_LAYERS if name == "num_hidden_layers" else None
        if isinstance(value, int) and not 1 <= value <= (most or value):
            limits = f"from 1 to {most:,}" if most else "of at least 1"
            raise BadInput(f'{where}: {name} must be a number {limits}: got {value!r}; for example "{name}": {example}')
    for name in ("dtype", "torch_dtype"):
        value = fields.get(name)
        if isinstance(value, str) and not isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype):
            raise BadInput(f'{where}: {name} must be a dtype of torch: got {value!r}; for example "{name}": "bfloat16"')


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
