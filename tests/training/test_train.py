"""Runs and comparisons: what they write, what they refuse, and that they go on where they stopped."""

import csv
import json
import os
import shutil
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from sagetrain.__main__ import compose
from sagetrain.errors import is_bad_input
from sagetrain.training import checkpoint, folder
from sagetrain.training.module import CausalLM, model_config
from sagetrain.training.signals import Stopped
from sagetrain.training.train import needed_tokens, run
from tests.tiny import MODEL

TINY = [
    "recipe=quickstart",
    "compare.arms=null",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "probe.every=0",
    *MODEL,
    "data.seq_len=32",
    "data.batch_size=2",
    "trainer.max_steps=4",
    "trainer.enable_progress_bar=false",
]


@pytest.fixture
def train(tmp_path: Path):
    """Trains a tiny model on a small text with the given changes; returns the run directories."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i} is {i + i}.\n" for i in range(500)))

    def go(*changes: str, out: str = "out") -> list[Path]:
        return run(compose([*TINY, f"data.path={text}", f"out={tmp_path / out}", *changes]))

    return go


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[str]:
    return [row["loss"] for row in rows(folder)]


def test_a_run_directory_says_all_there_is_to_know(train) -> None:
    (out,) = train("seed=3", "attention=bf16")
    info = json.loads((out / "run.json").read_text())
    assert {k: info[k] for k in ("name", "recipe", "arm", "seed", "status", "steps", "kernel")} == {
        "name": "bf16-seed3", "recipe": "quickstart", "arm": "bf16", "seed": 3, "status": "finished", "steps": 4,
        "kernel": "sdpa",
    }  # fmt: skip
    assert info["versions"]["torch"] == version("torch")
    assert "unigram_entropy" not in info  # it is that of the standard library, and this run reads data.path
    assert info["tokens_per_step"] == 64 and info["parameters"] > 10_000
    assert [row["step"] for row in rows(out)] == ["1", "2", "3", "4"]
    assert [row["tokens"] for row in rows(out)] == ["64", "128", "192", "256"]
    assert all(float(row[c]) > 0 for row in rows(out) for c in ("loss", "grad_norm", "tokens_per_s", "step_ms"))
    assert all(0 <= float(row["data_wait"]) < 1 for row in rows(out))
    config = OmegaConf.load(out / "config.yaml")
    assert config.seed == 3 and config.trainer.precision == "32-true" and (out / "checkpoints" / "last.ckpt").exists()


def test_a_run_takes_of_the_hub_what_it_needs(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of two micro-batches of two rows of 32 tokens; a run that goes on from it reads the same data."""
    load, file = datasets.load_dataset, str(tmp_path / "hub.parquet")
    datasets.Dataset.from_dict({"text": [f"document {i:05d}" for i in range(1000)]}).to_parquet(file)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, split, streaming: load("parquet", data_files=file, split=split, streaming=True),
    )
    hub = ("data.path=null", "data.source=some/set", "attention=bf16", "trainer.accumulate_grad_batches=2")
    (first,) = train(*hub, out="first")
    more = f"resume={first}", "trainer.max_steps=6"
    (then,) = train(*hub, *more, "data.batch_size=4", "trainer.accumulate_grad_batches=1", out="then")
    facts = [json.loads((out / "run.json").read_text())["data"] for out in (first, then)]
    assert facts[0] == facts[1] == {"documents": 35, "tokens": 525, "asked": 4 * 2 * 2 * 32}
    assert [row["step"] for row in rows(then)] == ["5", "6"]
    with pytest.raises(ValueError, match="the checkpoint was written with data .* 525 tokens"):
        train(*hub, *more, "data.tokens=1000", out="other")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for change, needed in ("trainer.devices=4", 1024), ("trainer.devices=[0,1]", 768), ("trainer.max_steps=-1", None):
        assert needed_tokens(compose([*TINY, change])) == needed


def test_the_same_command_gives_the_same_bits(train) -> None:
    assert losses(train(out="a")[0]) == losses(train(out="b")[0])
    assert losses(train(out="c")[0]) != losses(train("seed=1", out="d")[0])


def test_comparison_trains_each_arm_and_seed_then_reports(train, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["compare.arms=[bf16,sage_int8]", "compare.seeds=2", "trainer.max_steps=6"]
    runs = train(*changes)
    assert [r.name for r in runs] == ["bf16-seed0", "sage_int8-seed0", "bf16-seed1", "sage_int8-seed1"]
    first = {r.name: float(losses(r)[0]) for r in runs}
    # Same weights, same batch: the first losses of the arms differ by the rounding of the attention only.
    assert abs(first["bf16-seed0"] - first["sage_int8-seed0"]) < abs(first["bf16-seed0"] - first["bf16-seed1"])
    assert first["bf16-seed0"] != first["sage_int8-seed0"]
    parent = runs[0].parent
    assert {p.name for p in parent.iterdir()} >= {"report.html", "metrics.csv", "comparison.json"}
    assert "report.html" in capsys.readouterr().out
    # Once more with another seed: what is finished stays as it is.
    stamps = {r: (r / "metrics.csv").stat().st_mtime_ns for r in runs}
    shutil.rmtree(runs[1])
    more = train(*changes[:1], "compare.seeds=3", *changes[2:])
    assert len(more) == 6 and len(rows(runs[1])) == 6
    assert all((r / "metrics.csv").stat().st_mtime_ns == stamps[r] for r in runs if r != runs[1])
    assert "finished already" in capsys.readouterr().out


def test_another_configuration_does_not_mix_into_a_run(train) -> None:
    (out,) = train()
    before = losses(out)
    with pytest.raises(ValueError, match=r"another configuration \(optim.lr was 0.005 and is now 0.1\)"):
        train("optim.lr=0.1")
    with pytest.raises(ValueError, match="resume=never"):
        train("resume=never")
    assert losses(out) == before
    train("trainer.enable_progress_bar=true", "checkpoint.every_n_steps=7")  # says nothing about what is trained


def test_resume_from_a_path_starts_a_new_run_from_it(train) -> None:
    (first,) = train()
    (second,) = train(f"resume={first}", "trainer.max_steps=6", out="second")
    assert [row["step"] for row in rows(second)] == ["5", "6"]
    assert json.loads((second / "run.json").read_text())["steps"] == 6
    with pytest.raises(ValueError, match="of step 4: nothing is left to train up to trainer.max_steps=4"):
        train(f"resume={first}", out="third")
    assert not (second.parent / "third" / "run.json").exists()


@pytest.mark.parametrize("kind", ["text", "other tensors", "cut off", "folder"])
def test_resume_from_what_is_no_checkpoint(train, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.ckpt"
    if kind == "text":
        path.write_text("hello")
    elif kind == "other tensors":
        torch.save({"state_dict": {}}, path)
    elif kind == "folder":
        path.mkdir()
    else:
        (first,) = train(out="first")
        whole = (first / "checkpoints" / "last.ckpt").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no checkpoint|a folder") as caught:
        train(f"resume={path}")
    assert is_bad_input(caught.value)
    assert not (tmp_path / "out" / "run.json").exists()


def test_resume_from_another_model(train) -> None:
    (first,) = train()
    with pytest.raises(ValueError, match=r"another model: \S+ is missing there and \[\d+") as caught:
        train(f"resume={first}", "trainer.max_steps=6", "model.config.num_hidden_layers=3", out="second")
    assert is_bad_input(caught.value)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kinds", [("adamw", "adamw8bit"), ("adamw8bit", "adamw")])
def test_resume_from_another_optimizer(train, kinds: tuple[str, str]) -> None:
    (first,) = train(f"optim.kind={kinds[0]}")
    with pytest.raises(ValueError, match=f"its run has optim.kind={kinds[0]} and this one {kinds[1]}") as caught:
        train(f"optim.kind={kinds[1]}", f"resume={first}", out="second")
    assert is_bad_input(caught.value)


def test_resume_with_rows_of_another_length(train) -> None:
    """The 8 rows that were read are not the first 8 of those that the same text would be cut into now."""
    (first,) = train()
    with pytest.raises(ValueError, match="its run has data.seq_len=32 and this one 64, so its place") as caught:
        train("data.seq_len=64", "trainer.max_steps=6", f"resume={first}", out="second")
    assert is_bad_input(caught.value)


def test_what_the_user_asks_for_wins_over_the_checkpoint_of_another_run(train) -> None:
    changes = ["optim.warmup_steps=0", "optim.min_lr_ratio=1.0", "trainer.gradient_clip_val=null"]
    (first,) = train(*changes, "optim.lr=1e-2")
    asked = ["optim.lr=1e-4", "optim.betas=[0.5,0.6]", "optim.weight_decay=0.7", "trainer.max_steps=6"]
    (second,) = train(*changes, *asked, f"resume={first}", out="second")
    assert [float(row["lr"]) for row in rows(second)] == pytest.approx([1e-4] * 2)
    state = torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)
    groups = state["optimizer_states"][0]["param_groups"]
    assert [g["betas"] for g in groups] == [(0.5, 0.6)] * 2 and [g["weight_decay"] for g in groups] == [0.7, 0.0]
    assert state["optimizer_states"][0]["state"][0]["step"] == 6  # what was learned goes on
    # The shape of the schedule: halfway down a cosine to 0 of six steps, not where the other run stood.
    (third,) = train("optim.warmup_steps=0", "optim.min_lr_ratio=0.0", *asked, f"resume={first}", out="third")
    assert [float(row["lr"]) for row in rows(third)] == pytest.approx([0.25e-4, 1e-4 * (1 - 3**0.5 / 2) / 2], rel=1e-4)


def test_vocabulary_too_small_for_the_tokenizer(train) -> None:
    with pytest.raises(ValueError, match="264 tokens and the model only 100"):
        train("model.config.vocab_size=100")


def test_no_room_for_a_checkpoint_is_said_before_the_first_step(train, monkeypatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        OSError, match="no room for the checkpoints.*they need 1.* MB and .* has 0.0 MB free.*out=FOLDER"
    ):
        train()
    assert not (tmp_path / "out" / "metrics.csv").exists()
    monkeypatch.undo()
    assert len(rows(train()[0])) == 4


@pytest.mark.parametrize("name", [".lock", "config.yaml"])
def test_a_disk_that_is_full_at_the_start_is_said_in_one_line(train, monkeypatch, tmp_path: Path, name: str) -> None:
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    if name == ".lock":
        monkeypatch.setattr(folder.socket, "gethostname", full)
    else:
        monkeypatch.setattr("sagetrain.training.train.write", full)
    with pytest.raises(OSError, match=f"no space left for {tmp_path / 'out'}.*start the same command again") as error:
        train()
    assert is_bad_input(error.value)


def torch_on_a_full_disk() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.save({"x": torch.zeros(10**6)}, "/dev/full")
    return caught.value


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), torch_on_a_full_disk()], ids=["os", "torch"])
def test_a_failed_checkpoint_keeps_the_last_one_and_the_metrics(train, monkeypatch, tmp_path: Path, error) -> None:
    undisturbed = losses(train(out="undisturbed")[0])
    save, calls = torch.save, []

    def full_disk(content, path) -> None:
        calls.append(path)
        save(content, path)
        if len(calls) == 2:
            with open(path, "r+b") as file:
                file.truncate(1000)
            raise error

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match="could not write the checkpoint of step 4.*step-00000002.ckpt.*same command"):
        train("checkpoint.every_n_steps=2")
    out = tmp_path / "out"
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["last.ckpt", "step-00000002.ckpt"]
    assert losses(out) == undisturbed
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    train("checkpoint.every_n_steps=2")
    assert losses(out) == undisturbed and json.loads((out / "run.json").read_text())["status"] == "finished"


def test_no_other_failure_is_taken_for_a_full_disk(train, monkeypatch, tmp_path: Path) -> None:
    def broken(content, path) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(checkpoint.torch, "save", broken)
    with pytest.raises(RuntimeError, match="^CUDA error"):
        train("checkpoint.every_n_steps=2")
    assert not list((tmp_path / "out" / "checkpoints").iterdir())
    assert "Traceback" in json.loads((tmp_path / "out" / "run.json").read_text())["traceback"]


def test_a_loss_that_is_not_finite_stops_the_run(train, monkeypatch, tmp_path: Path) -> None:
    said = "the loss or the gradient of step .* is not finite .*(nan|inf).*last good checkpoint is kept"
    with pytest.raises(FloatingPointError, match=said):
        train("optim.lr=1e30", "optim.warmup_steps=0", "trainer.gradient_clip_val=null", "checkpoint.every_n_steps=1")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"


def test_without_a_checkpoint_none_is_promised(train) -> None:
    with pytest.raises(FloatingPointError, match="There is no checkpoint yet: start anew with a lower optim.lr"):
        train("optim.lr=1e30", "optim.warmup_steps=0", "trainer.gradient_clip_val=null", "checkpoint.keep=none")


NAN_GRADIENT = 3


@pytest.mark.parametrize("logger", ["csv", "wandb"])
def test_what_is_not_finite_is_never_saved_and_the_last_good_checkpoint_stays(
    train, monkeypatch, tmp_path: Path, logger: str
) -> None:
    """The gradient of one step overflows, its loss does not; the weights are spoilt when the checkpoint is due."""
    step = CausalLM.training_step

    def overflow(self: CausalLM, batch: dict, index: int) -> torch.Tensor:
        loss = step(self, batch, index)
        if index == NAN_GRADIENT - 1:
            loss.register_hook(lambda grad: grad * float("nan"))
        return loss

    monkeypatch.setattr(CausalLM, "training_step", overflow)
    monkeypatch.setenv("WANDB_MODE", "offline")
    ends = []
    if logger == "wandb":
        import wandb

        monkeypatch.setattr(wandb, "finish", lambda exit_code=None: ends.append(exit_code))
    with pytest.raises(FloatingPointError, match=r"ast good checkpoint is kept"):
        train("checkpoint.every_n_steps=1", f"logger={logger}")
    _, kept = sorted((tmp_path / "out" / "checkpoints").glob("step-*.ckpt"))
    assert kept.name == f"step-{NAN_GRADIENT - 1:08d}.ckpt"
    weights = torch.load(kept, weights_only=True)["state_dict"]
    assert all(x.isfinite().all() for x in weights.values())
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
    assert ends == ([1] if logger == "wandb" else [])
    # The advice in the message: from that checkpoint, with a lower rate, into a new folder.
    monkeypatch.undo()
    (out,) = train(f"resume={kept}", "optim.lr=1e-4", out="again")
    assert [row["step"] for row in rows(out)] == ["3", "4"]


def test_the_optimizer_state_is_looked_at_too(train, monkeypatch, tmp_path: Path) -> None:
    """A huge gradient leaves AdamW's second moment infinite and the weights as they were."""
    clip = CausalLM.configure_gradient_clipping

    def huge(self: CausalLM, *arguments: object, **options: object) -> None:
        clip(self, *arguments, **options)
        if self.trainer.global_step == 1:
            next(self.parameters()).grad.fill_(1e25)

    monkeypatch.setattr(CausalLM, "configure_gradient_clipping", huge)
    with pytest.raises(FloatingPointError, match="step 2 are not finite.*step-00000001.ckpt"):
        train("checkpoint.every_n_steps=1")


def test_several_devices_compare_only_under_an_outer_launcher(train) -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2 -m sagetrain"):
        train("compare.arms=[bf16,sage_int8]", "trainer.devices=2", "strategy=ddp")


@pytest.mark.parametrize("changes", [[], ["compare.arms=[bf16,sage_int8]", "trainer.devices=[1]"]], ids=str)
def test_a_gpu_that_is_not_there_is_said(train, monkeypatch, changes: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="trainer.accelerator=gpu: torch sees no CUDA device"):
        train("trainer.accelerator=gpu", *changes)


def test_a_checkout_on_a_machine_without_git(train, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    (out,) = train("attention=bf16")
    assert "git_commit" not in json.loads((out / "run.json").read_text())


def test_pretrained_weights_need_no_accelerate_on_a_gpu(train, monkeypatch, tmp_path: Path) -> None:
    """On a GPU Lightning builds the model in that device's context; `meta` is the one that a CPU has."""
    AutoModelForCausalLM.from_config(model_config(compose(TINY).model)).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", lambda *_, **__: torch.device("meta"))
    (out,) = train("model=pretrained", f"model.path={tmp_path / 'model'}", "model.tokenizer=byte")
    assert len(rows(out)) == 4


def test_an_error_that_a_signal_brought_is_that_signal(train, tmp_path: Path, monkeypatch) -> None:
    """As when a launcher ends a whole group of processes, the compiler of this one among them."""

    def compiler_dies(self: CausalLM, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("g++ was terminated\nand what it said")

    monkeypatch.setattr(CausalLM, "training_step", compiler_dies)
    with pytest.raises(
        Stopped, match=r"SIGTERM in the middle of a step \(RuntimeError: g\+\+ was terminated"
    ) as caught:
        train()
    assert caught.value.code == 128 + signal.SIGTERM
    assert isinstance(caught.value.__cause__, RuntimeError)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["status"] == "stopped" and "SIGTERM" in facts["error"]
    assert "compiler_dies" in facts["traceback"]  # a bug of ours would be found again
