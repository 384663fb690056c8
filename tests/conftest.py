"""Tests marked `gpu` are skipped where torch sees no CUDA GPU; token tables go to a cache that ends with the tests."""

import os
from tempfile import TemporaryDirectory

import pytest
import torch

CACHE = TemporaryDirectory(prefix="sagetrain-tests-")
os.environ["HF_DATASETS_CACHE"] = CACHE.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA GPU here"))
