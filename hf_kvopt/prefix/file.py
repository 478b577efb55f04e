"""Prefix stores on disk: one safetensors file, with a manifest in its header that says what the tensors are.

    "layer 0 keys", "layer 0 keys scale", ...     the tree's blocks in the manifest's order, see `pool.block_pieces`
    "states 12 16 0 0 conv", ...                  where layers hold states, see `prefix.file_states`

The manifest holds the tree (tokens and parent of each block), the model's fingerprint, format and versions, and a
SHA-256 of itself and of every tensor: a truncated or changed file is refused before anything is allocated.
"""

import hashlib
import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt.errors import CacheStateError
from hf_kvopt.pool.block_pieces import describe, is_centre, pieces_of, put_centres, states_like
from hf_kvopt.prefix.cache import PrefixSharedCache
from hf_kvopt.prefix.file_states import put_states, states_of
from hf_kvopt.prefix.identity import fingerprint
from hf_kvopt.prefix.node import Node, descendants
from hf_kvopt.prefix.shared_blocks import SharedBlocks, device_of

VERSION = 3


def save(blocks: SharedBlocks, path: Path) -> None:
    """Write the tree and its blocks; the file appears whole or not at all."""
    if blocks.model is None:
        raise CacheStateError(
            "a store is saved with the identity of its model: got one made from a config; make it from the model"
        )
    model, key = fingerprint(blocks.model, whole=True), blocks.key_of(None)
    assert key is not None  # a model without a key has no fingerprint
    nodes = [
        node
        for root_key, root in blocks.index.roots.items()
        if isinstance(root_key, tuple) and root_key[0] == key[0]
        for node in descendants(root)
    ]
    tensors: dict[str, Tensor] = {}
    for layer_idx, pool in blocks.pools.items():
        space = blocks.space_of(pool)
        tails = blocks.allocators[space].tails
        exact = [] if tails is None else [tails.places[node.blocks[space]] for node in nodes if node.is_exact]
        pieces = pieces_of(layer_idx, pool, [node.blocks[space] for node in nodes], exact)
        tensors |= {piece.name: piece.typed(piece.read()).cpu() for piece in pieces}
    states, held = states_of(nodes)
    tensors |= held
    manifest = {
        "version": VERSION,
        "model": model,
        "block_size": blocks.block_size,
        "max_tokens": blocks.max_tokens,
        "formats": {
            "format": blocks.formats.format,
            "skip_layers": list(blocks.formats.skip_layers),
            "layer_formats": list(blocks.formats.layer_formats.items()),
        },
        "pools": {str(idx): [describe(plane) for plane in pool.planes] for idx, pool in blocks.pools.items()},
        "nodes": _tree(blocks, nodes),
        "state_limit": blocks.state_limit,
        "states": states,
        "tensors": {name: _digest(tensor) for name, tensor in tensors.items()},
    }
    text = json.dumps(manifest, sort_keys=True)
    header = {"manifest": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=header)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Contents(NamedTuple):
    """Contents of a file: the options of its store, what the manifest says, and the tensors."""

    options: dict[str, Any]
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: Path, model: PreTrainedModel) -> Contents:
    """Return the contents of a file that was written for `model`."""
    manifest, tensors = _read(path)
    if manifest["model"] != fingerprint(model, whole=True):
        raise _refused(path, "it was written for another model, or for other weights")
    formats = manifest["formats"]
    options = {
        "max_tokens": manifest["max_tokens"],
        "block_size": manifest["block_size"],
        "format": formats["format"],
        "skip_layers": tuple(formats["skip_layers"]),
        "layer_formats": dict(formats["layer_formats"]),
        "state_limit": manifest.get("state_limit"),
    }
    return Contents(options, manifest, tensors)


def fill(blocks: SharedBlocks, contents: Contents, cache: PrefixSharedCache) -> None:
    """Take over what a file holds; `cache`, a blank one, says how the layers are stored."""
    with blocks.lock:
        num_blocks = len(contents.manifest["nodes"])
        for allocator in blocks.allocators:
            allocator.ensure_free(num_blocks)
        rows = [allocator.allocate(num_blocks) for allocator in blocks.allocators]
        _fill_pools(blocks, contents, cache, rows)
        texts = _plant(blocks, contents.manifest["nodes"], rows)
        lengths = [len(entry["tokens"]) for entry in contents.manifest["nodes"]]
        put_states(blocks, cache, contents.manifest.get("states", ()), contents.tensors, texts, lengths)
        for allocator, row in zip(blocks.allocators, rows, strict=True):
            allocator.release(row)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors of a file, every byte of which was checked."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            text = header.get("manifest", "")
            if hashlib.sha256(text.encode()).hexdigest() != header.get("sha256"):
                raise _refused(path, "its manifest is missing or damaged")
            manifest: dict[str, Any] = json.loads(text)
            if manifest["version"] != VERSION:
                raise _refused(path, f"it has version {manifest['version']}, not {VERSION}")
            names = set(file.keys())
            if names != set(manifest["tensors"]):
                raise _refused(path, "tensors are missing or were added")
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise _refused(path, f"it is no whole safetensors file ({error})") from error
    damaged = [name for name, tensor in tensors.items() if _digest(tensor) != manifest["tensors"][name]]
    if damaged:
        raise _refused(path, f"{damaged[0]} is damaged")
    return manifest, tensors


def _fill_pools(blocks: SharedBlocks, contents: Contents, cache: PrefixSharedCache, rows: list[list[int]]) -> None:
    """Make the pools that the file had, and copy the blocks to their new places."""
    _, manifest, tensors = contents
    cache.append_passes()
    layers: list[Any] = cache.layers
    model = blocks.model
    assert model is not None  # `read` compared its fingerprint
    spaces = blocks.allocators
    exact = [i for i, entry in enumerate(manifest["nodes"]) if entry.get("exact")]
    for allocator, row in zip(spaces, rows, strict=True):
        if allocator.tails is not None:
            allocator.tails.give([row[i] for i in exact])
    for idx, planes in sorted(manifest["pools"].items(), key=lambda item: int(item[0])):
        layer = layers[int(idx)]
        pool = layer.make_pool(*states_like(planes, device_of(model, int(idx))))
        blocks.keep_pool(int(idx), pool, layer.table.allocator)
        numbers = rows[spaces.index(layer.table.allocator)]
        tails = layer.table.allocator.tails
        places = [] if tails is None else [tails.places[numbers[i]] for i in exact]
        for piece in pieces_of(int(idx), pool, numbers, places):
            if not is_centre(piece):
                piece.write(tensors[piece.name].contiguous().view(torch.uint8).flatten(1))
        put_centres(int(idx), pool, numbers, tensors)


def _plant(
    blocks: SharedBlocks, entries: list[dict[str, Any]], rows: list[list[int]]
) -> list[tuple[Hashable, list[int]]]:
    """Insert every text of the tree, parents before children; return key and tokens up to the end of each node."""
    paths: list[tuple[Hashable, list[int], list[int]]] = []
    key = blocks.key_of(None)
    assert key is not None  # a model without a key has no fingerprint
    for i, entry in enumerate(entries):
        if entry["parent"] is None:
            owner = (key[0], entry["namespace"])
            path = (owner, entry["tokens"], [i])
        else:
            owner, tokens, indices = paths[entry["parent"]]
            path = (owner, tokens + entry["tokens"], [*indices, i])
        paths.append(path)
        kept = [j for j, number in enumerate(path[2]) if entries[number].get("exact")]
        blocks.index.insert(path[0], path[1], [[row[j] for j in path[2]] for row in rows], kept)
    return [(owner, tokens) for owner, tokens, _ in paths]


def _tree(blocks: SharedBlocks, nodes: list[Node]) -> list[dict[str, Any]]:
    """Tokens and parent of each node; children of a root name their namespace."""
    numbers = {id(node): i for i, node in enumerate(nodes)}
    keys = {id(root): key for key, root in blocks.index.roots.items()}
    entries = []
    for node in nodes:
        entry: dict[str, Any] = {"tokens": list(node.tokens), "parent": numbers.get(id(node.parent))}
        if node.is_exact:
            entry["exact"] = True
        if entry["parent"] is None:
            key = keys[id(node.parent)]
            assert isinstance(key, tuple)
            namespace = key[1]
            if not isinstance(namespace, str | int | None):
                raise CacheStateError(f"only namespaces of text or numbers can be saved: got {namespace!r}")
            entry["namespace"] = namespace
        entries.append(entry)
    return entries


def _digest(tensor: Tensor) -> str:
    head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(head + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _refused(path: Path, reason: str) -> CacheStateError:
    return CacheStateError(f"{path} is not loaded: {reason}; save the store again from the model that is to use it")
