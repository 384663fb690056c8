"""Evaluation by EleutherAI's lm-evaluation-harness: what is asked (tasks), how (harness), what is kept (scores)."""

import torch

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # of Lightning's precisions
