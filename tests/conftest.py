"""Tests marked `gpu` are skipped where torch sees no CUDA GPU; token tables go to a cache that ends with the tests;
files that take long begin first. What has been imported is no garbage: a collection need not go through it."""

import gc
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

CACHE = TemporaryDirectory(prefix="sagetrain-tests-")
os.environ["HF_DATASETS_CACHE"] = CACHE.name


def _order(file: Path) -> tuple[bool, int]:
    """First those that start processes, then the others, the largest before the smaller ones."""
    text = file.read_text()
    return not any(word in text for word in ("subprocess", "tests.launch", "tests.ranks")), -len(text)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {file: _order(file) for file in {item.path for item in items}}
    items.sort(key=lambda item: order[item.path])  # or one worker has a long file left when the others are done
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA GPU here"))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the graphs that torch.compile makes for Inductor run as they are: to make kernels of them takes far longer,
    and is tested where a test is without this."""
    real, backend = torch.compile, "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", lambda *given, **options: real(*given, **options | {"backend": backend}))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # each run ends with a collection, which else takes as long as its two steps
