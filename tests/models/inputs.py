"""Left-padded prompts, with the encoder, image or audio inputs that a model takes."""

import torch
from transformers import PreTrainedModel

from tests.models.cases import Case
from tests.models.shrink import PAD_TOKEN

PROMPT_LENS = (12, 7)
NUM_IMAGE_TOKENS = 4
Inputs = dict[str, torch.Tensor]


def inputs_for(case: Case, model: PreTrainedModel) -> Inputs:
    """Two prompts of unlike length, padded on the left; no prompt holds the pad token."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = _prompts(generator)
    if case.modality == "encoder":
        encoder_ids, encoder_mask = _prompts(generator)
        return _encoder_decoder({"input_ids": encoder_ids, "attention_mask": encoder_mask}, ids, mask)
    if case.modality == "speech":
        config = model.config
        shape = (len(PROMPT_LENS), config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=generator), "decoder_input_ids": ids}
    if case.modality == "codebooks":
        # One row per codebook, shifted against each other by the model: padding on the left is not foreseen.
        return {"input_ids": torch.randint(3, 100, (2 * model.num_codebooks, max(PROMPT_LENS)), generator=generator)}
    if case.modality == "image":
        return _with_images(case, model, ids, mask, generator)
    return {"input_ids": ids, "attention_mask": mask}


def _prompts(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(PROMPT_LENS), max(PROMPT_LENS))
    ids = torch.randint(3, 100, shape, generator=generator)
    padding = torch.arange(shape[1]) < shape[1] - torch.tensor(PROMPT_LENS)[:, None]
    return ids.masked_fill(padding, PAD_TOKEN), (~padding).long()


def _encoder_decoder(encoder: Inputs, ids: torch.Tensor, mask: torch.Tensor) -> Inputs:
    return {**encoder, "decoder_input_ids": ids, "decoder_attention_mask": mask}


def _with_images(
    case: Case, model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, generator: torch.Generator
) -> Inputs:
    """Put one image of 16 x 16 pixels (four patches) in front of the last token of each prompt."""
    vision = model.config.vision_config
    text = {"input_ids": ids, "attention_mask": mask}
    if case.name.startswith("Mllama"):
        ids[:, -3] = model.config.image_token_index
        tiles = (torch.arange(vision.max_num_tiles) == 0).long().expand(2, 1, -1)  # one of four tiles in use
        sees_image = torch.arange(ids.shape[1]) >= ids.shape[1] - 3
        return {
            **text,
            "pixel_values": torch.randn(2, 1, vision.max_num_tiles, 3, 16, 16, generator=generator),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": tiles,
            "cross_attention_mask": sees_image[:, None, None] * tiles[:, None],
        }
    ids[:, -1 - NUM_IMAGE_TOKENS : -1] = model.config.image_token_id
    if case.name.startswith("Qwen2VL"):
        grid = torch.tensor([[1, 4, 4]] * 2)
        patch_len = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(int(grid.prod(1).sum()), patch_len, generator=generator)
        types = (ids == model.config.image_token_id).int()
        return {**text, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": types}
    return {**text, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
