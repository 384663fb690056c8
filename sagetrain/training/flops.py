"""Model FLOPs, by the formula of docs/pretraining.md, and the peak that MFU holds them against."""

from typing import Any

import torch
from torch import Tensor

from sagetrain.training.module import numel

PEAK = {  # dense BF16; the first that is part of a device's name
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "RTX 4090": 165e12,
    "RTX 5090": 210e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Of one device, a second; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in PEAK.items() if known in name), None)


def model_flops(model: torch.nn.Module, batch: dict[str, Any]) -> float | Tensor:
    """Of forward and backward; a tensor where the lengths of the documents are on a device, which is not waited for.

    A frozen parameter has no gradient of its own and counts for two thirds; an embedding that is not the head too is
    only looked up.
    """
    config = model.config.get_text_config()
    tokens, rows = batch["input_ids"].numel(), batch["input_ids"].shape[0]
    cu = batch.get("cu_seq_lens_q")
    squares = (cu.diff().double() ** 2).sum() if cu is not None else rows * (tokens / rows) ** 2
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    lookup, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is lookup
    factors = [p for p in model.parameters() if tied or p is not lookup]
    products = sum((6 if p.requires_grad else 4) * numel(p) for p in factors)
    return float(products) * tokens + 6.0 * config.num_hidden_layers * width * squares
