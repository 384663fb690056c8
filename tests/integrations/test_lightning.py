"""The Lightning strategies train like plain PyTorch, on one and on two ranks, through the real FSDP2 and DeepSpeed."""

import json
from typing import Any

import pytest
import strategy_worker as worker
import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, StrategyRegistry

from sagetrain.integrations import lightning as strategies
from sagetrain.integrations.lightning import SageDDPStrategy, SageDeepSpeedStrategy, SageFSDP2Strategy, shard
from tests.ranks import launch

CLASSES = {"ddp": SageDDPStrategy, "fsdp2": SageFSDP2Strategy, "deepspeed": SageDeepSpeedStrategy}
RUNS = ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"]
ranks_1_and_2 = pytest.mark.parametrize("ranks", [1, 2])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank wrote, by number of ranks: [1] -> one result, [2] -> two."""
    out = tmp_path_factory.mktemp("ranks")
    launch(worker.__file__, out, str(out))
    return {n: [json.loads((out / f"{n}.{rank}.json").read_text()) for rank in range(n)] for n in (1, 2)}


def train_plainly(
    dtype: torch.dtype, parts: int = 1, clip: float = worker.CLIP, accumulation: int = 1, frozen: bool = False
) -> tuple[torch.Tensor, list[float]]:
    """Losses per micro-batch and gradient norms of a loop without Lightning; `parts`: a micro-batch in so many backward
    passes. A user's own losses of `accumulation` micro-batches are averaged, fewer at an epoch's end summed as if they
    were as many, which is what Lightning does."""
    model = worker.tiny_llama(seed=0).to(dtype)
    model.set_attn_implementation("sdpa")
    if frozen:
        worker.train_projections_only(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **worker.OPTIM)
    losses, norms = [], []
    for i, tokens in enumerate(worker.global_batches()):
        loss = sum(model(input_ids=part, labels=part).loss / parts for part in tokens.chunk(parts))
        (loss / accumulation).backward()
        losses.append(loss.item())
        in_epoch = i % worker.STEPS_PER_EPOCH + 1
        if in_epoch % accumulation == 0 or in_epoch == worker.STEPS_PER_EPOCH:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
            optimizer.step()
            optimizer.zero_grad()
    return torch.tensor(losses, dtype=torch.float64), norms


@pytest.fixture(scope="module")
def reference() -> tuple[torch.Tensor, float]:
    """Losses in fp64, and how far a strategy may be from them.

    A strategy does the same maths in fp32 and adds in another order (over ranks, shards, buckets). So does plain fp32
    when it takes the batch in one or in two parts: allowed is twice the larger of those two errors, and one unit in
    the last place of a loss. (transformers computes norms and the loss in fp32 in any case, so an error may happen to
    be zero.)
    """
    exact, norms = train_plainly(torch.float64)
    assert min(norms) > worker.CLIP, "clipping must be at work in every step"
    errors = [(train_plainly(torch.float32, parts)[0] - exact).abs().max().item() for parts in (1, 2)]
    allowed = 2 * max(errors) + torch.finfo(torch.float32).eps * exact.max().item()
    unclipped, _ = train_plainly(torch.float64, clip=float("inf"))
    assert (unclipped - exact).abs().max() > 1000 * allowed, "a strategy that does not clip must be seen"
    return exact, allowed


@ranks_1_and_2
@pytest.mark.parametrize("run", RUNS)
def test_losses_are_those_of_plain_training(results, reference, run: str, ranks: int) -> None:
    exact, allowed = reference
    for result in results[ranks]:
        losses = torch.tensor(result["runs"][run]["losses"], dtype=torch.float64)
        assert losses.shape == exact.shape
        assert (losses - exact).abs().max() <= allowed


@ranks_1_and_2
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", ["accumulated", "frozen"])
def test_accumulation_and_frozen_weights_as_in_plain_training(results, reference, kind: str, run: str, ranks) -> None:
    options = {"accumulation": worker.ACCUMULATION} if kind == "accumulated" else {"frozen": True}
    exact, norms = train_plainly(torch.float64, **options)
    assert max(norms) > worker.CLIP, "clipping must be at work"
    assert (exact - reference[0]).abs().max() > 100 * reference[1], "or the test could not fail"
    for result in results[ranks]:
        losses = torch.tensor(result["runs"][run][kind], dtype=torch.float64)
        assert (losses - exact).abs().max() <= reference[1]


@ranks_1_and_2
@pytest.mark.parametrize("run", RUNS)
def test_resumed_run_has_the_same_losses(results, run: str, ranks: int) -> None:
    for result in results[ranks]:
        losses, resumed = result["runs"][run]["losses"], result["runs"][run]["resumed"]
        assert resumed == losses[worker.STEPS_PER_EPOCH :]
        assert len(resumed) == worker.STEPS_PER_EPOCH


@ranks_1_and_2
def test_all_strategies_end_with_the_same_weights(results, reference, ranks: int) -> None:
    """Seen in the validation losses; shows also that validating after training works (DeepSpeed wraps anew for it)."""
    for result in results[ranks]:
        validated = [result["runs"][run]["validated"] for run in RUNS]
        assert len(validated[0]) == worker.STEPS_PER_EPOCH
        spread = torch.tensor(validated, dtype=torch.float64)
        assert (spread - spread[0]).abs().max() <= reference[1]


@ranks_1_and_2
@pytest.mark.parametrize("kind", CLASSES)
def test_by_name(results, kind: str, ranks: int) -> None:
    for result in results[ranks]:
        named = result["names"][kind]
        assert named["type"] == CLASSES[kind].__name__
        assert named["attention"] == "sage_int8"
        exact = result["runs"][RUNS[0]]["losses"]
        assert named["losses"][-1] < named["losses"][0]
        assert named["losses"] != exact, "INT8 attention leaves a trace in the losses: the kernel was not used"
    assert all(result["names"][kind]["losses"] == named["losses"] for result in results[ranks])


@ranks_1_and_2
@pytest.mark.parametrize("kind", CLASSES)
def test_refuses_a_module_without_hugging_face_model(results, kind: str, ranks: int) -> None:
    for result in results[ranks]:
        message = result["errors"][kind]["no model"]
        assert "no Hugging Face model in Other" in message and "attention=None" in message


@pytest.mark.parametrize("kind", CLASSES)
def test_ranks_with_different_kernels_are_refused_on_every_rank(results, kind: str) -> None:
    for result in results[2]:
        differ, missing = result["errors"][kind]["kernels differ"], result["errors"][kind]["no kernel"]
        assert "rank 0: sage_int8, kernel cpu/kernel_of_0; rank 1: sage_int8, kernel cpu/kernel_of_1" in differ
        assert "rank 1: sage_int8, kernel none: nothing for rank 1" in missing


def test_context_parallel_is_refused(results) -> None:
    for result in results[2]:
        assert "context_parallel does not see the INT8 attention op" in result["errors"]["ddp"]["context_parallel"]


@ranks_1_and_2
def test_fsdp2_refuses_parameters_that_nobody_shards(results, ranks: int) -> None:
    for result in results[ranks]:
        assert "shard(self.model, self.device_mesh)" in result["errors"]["fsdp2"]["not sharded"]
        assert "bf16-mixed" in result["errors"]["fsdp2"]["precision"]


@pytest.mark.parametrize("kind", CLASSES)
def test_registered(kind: str) -> None:
    strategy = StrategyRegistry.get(f"sage_{kind}")
    assert type(strategy) is CLASSES[kind]
    assert strategy.attention == "sage_int8"
    assert CLASSES[kind](attention=None).attention is None


@pytest.mark.parametrize("kind", CLASSES)
def test_unknown_attention_lists_the_choices(kind: str) -> None:
    with pytest.raises(ValueError, match=r"'sage_int9' is unknown; choose one of .*eager.*sage_int8.*sdpa"):
        CLASSES[kind](attention="sage_int9")


def test_model_that_cannot_change_its_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = worker.tiny_llama(seed=0)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match="LlamaForCausalLM runs attention 'eager'"):
        SageDDPStrategy(attention="sdpa")._set_attention([model])


def test_shard_refuses_a_model_without_layers() -> None:
    with pytest.raises(ValueError, match="no transformer layer in Linear"):
        shard(torch.nn.Linear(2, 2), mesh=None)  # type: ignore[arg-type]


def test_missing_deepspeed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sagetrain\[deepspeed\]'"):
        StrategyRegistry.get("sage_deepspeed")


def test_deepspeed_on_cuda_is_lightnings_own(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(DeepSpeedStrategy, "setup_environment", lambda self: called.append(self.parallel_devices))
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    strategy = SageDeepSpeedStrategy(accelerator=CUDAAccelerator(), parallel_devices=devices)
    strategy.setup_environment()
    assert called == [devices]


def test_deepspeed_on_cpu_beside_a_gpu_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    cuda = type("Accelerator", (), {"device_name": lambda self: "cuda"})()
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: cuda)
    strategy = SageDeepSpeedStrategy(accelerator=CPUAccelerator(), parallel_devices=[torch.device("cpu")])
    with pytest.raises(RuntimeError, match="DS_ACCELERATOR=cpu"):
        strategy.setup_environment()


def test_private_attributes_of_lightning_that_fsdp2_sets() -> None:
    strategy = ModelParallelStrategy()
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == ("auto", "auto")
