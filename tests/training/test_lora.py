"""Adapters: they alone are trained and saved, every strategy trains the same ones, peft reads them, merged or not."""

import csv
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import sagetrain.data
from sagetrain.__main__ import compose
from sagetrain.errors import is_bad_input
from sagetrain.export import main
from sagetrain.training.checks import check_settings
from sagetrain.training.export import export, load
from sagetrain.training.lora import adapt, merge, options, save
from sagetrain.training.module import CausalLM
from sagetrain.training.train import run
from tests.ranks import train_each
from tests.tiny import pretrained

LORA = ["model.lora.r=4", "model.lora.alpha=16"]
STRATEGIES = {
    "fsdp2": ["strategy=fsdp2"],
    "ddp": ["strategy=ddp"],
    "zero2": ["strategy=deepspeed", "strategy.stage=2"],
    "zero3": ["strategy=deepspeed", "strategy.stage=3"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and beside it what it is trained on."""
    folder = tmp_path_factory.mktemp("lora")
    questions = ({"question": f"Say {i}", "answer": f"{'word ' * (i % 5)}#### {i}"} for i in range(40))
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    return pretrained(folder / "base")


def command(base: Path, *changes: str) -> list[str]:
    """Four steps of four examples, each validated; with bf16's arm, since its losses are compared closely."""
    return [
        "recipe=gsm8k_finetune", f"model.path={base}", f"data.path={base.parent / 'questions.jsonl'}", "attention=bf16",
        "data.val_fraction=0.2", "data.seq_len=128", "data.batch_size=4", "trainer.accelerator=cpu",
        "trainer.precision=32-true", "trainer.max_steps=4", "trainer.accumulate_grad_batches=1", "optim.lr=0.02",
        "optim.warmup_steps=0", "trainer.limit_val_batches=1.0", "trainer.val_check_interval=4", "probe.every=0",
        "trainer.enable_progress_bar=false", *LORA, *changes,
    ]  # fmt: skip


def train(base: Path, out: Path, *changes: str) -> Path:
    return run(compose([*command(base, *changes), f"out={out}"]))[0]


def column(out: Path, name: str) -> list[float]:
    with open(out / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    return train(base, base.parent / "trained")


def validated(model: PreTrainedModel | PeftModel, base: Path) -> float:
    """Mean loss on the held-out questions, as the run measures it."""
    cfg = compose(command(base))
    tokenizer = sagetrain.data.build_tokenizer(str(base))
    stream = sagetrain.data.build(cfg.data, tokenizer, cfg.data.seq_len, cfg.seed, cfg.data.batch_size).stream
    total = count = 0
    model.eval()
    for batch in stream.validation(0, 1):
        targets = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total, count = total + targets * float(model(**batch, use_cache=False).loss), count + targets
    return total / count


def of_base(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, attn_implementation="bf16_sdpa")


@pytest.mark.parametrize("keep", ["last", "weights"])
def test_peft_reads_the_adapters_and_transformers_what_they_were_merged_into(
    base: Path, trained: Path, tmp_path: Path, keep: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained if keep == "last" else train(base, tmp_path / "out", "checkpoint.keep=weights")
    assert main([str(out), str(tmp_path / "adapters")]) == main([str(out), str(tmp_path / "whole"), "--merge"]) == 0
    assert capsys.readouterr().out.count("written: ") == 2
    (expected,) = column(out, "val_loss")
    adapted = PeftModel.from_pretrained(of_base(base), tmp_path / "adapters")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", attn_implementation="bf16_sdpa")
    assert [validated(model, base) for model in (adapted, whole)] == pytest.approx([expected] * 2, rel=1e-5)
    assert abs(validated(of_base(base), base) / expected - 1) > 0.01
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "adapters").iterdir()
    } and not (tmp_path / "adapters" / "model.safetensors").exists()
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 16, str(base))
    for file in tmp_path / "adapters" / "adapter_model.safetensors", tmp_path / "whole" / "model.safetensors":
        assert file.stat().st_mode == (file.parent / "tokenizer.json").stat().st_mode  # as readable
    assert not list((tmp_path / "whole").glob("adapter*")) and (tmp_path / "whole" / "tokenizer.json").exists()


def test_a_run_is_read_from_another_directory_than_it_was_started_in(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    run_folder = train(base, tmp_path / "run", f"model.path={base.name}", "checkpoint.keep=weights")
    monkeypatch.chdir(tmp_path)
    assert (export(run_folder, tmp_path / "whole", merge=True) / "model.safetensors").exists()
    assert load(run_folder)[1] == 4
    assert json.loads((run_folder / "weights" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )


def test_a_checkpoint_holds_the_adapters_alone_and_all_linear_layers_have_one(base: Path, trained: Path) -> None:
    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    weights, info = state["state_dict"], json.loads((trained / "run.json").read_text())
    assert len(weights) == 2 * 7 * 2 and all(x.dtype == torch.float32 for x in weights.values())
    assert all(".lora_" in name and "lm_head" not in name for name in weights)
    assert info["trained_parameters"] == sum(x.numel() for x in weights.values())
    assert info["parameters"] == info["trained_parameters"] + sum(p.numel() for p in of_base(base).parameters())
    assert len(state["optimizer_states"][0]["state"]) == len(weights)


def test_adapters_are_drawn_from_the_seed_alone(base: Path, tmp_path: Path) -> None:
    def drawn(out: str, *changes: str) -> dict[str, torch.Tensor]:
        still = ["optim.lr=0.0", "trainer.limit_val_batches=0", "trainer.max_steps=1", *changes]
        folder = train(base, tmp_path / out, *still, "checkpoint.keep=weights") / "weights"
        return load_file(folder / "adapter_model.safetensors")

    first, other = drawn("first"), drawn("other", "seed=1")
    torch.manual_seed(17)
    again = drawn("again", "model.lora.dropout=0.5")
    names = [name for name in first if "lora_A" in name]
    assert len(names) == 14 and all(torch.equal(first[name], again[name]) for name in names)
    assert not any(torch.equal(first[name], other[name]) for name in names)
    assert not any(first[name].any() for name in first if "lora_B" in name)


def test_a_run_that_goes_on_repeats_its_losses(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, whose random numbers are part of the state."""
    changes = ["model.lora.dropout=0.2", "checkpoint.every_n_steps=2"]
    whole = train(base, tmp_path / "whole", *changes)
    step = CausalLM.training_step

    def breaks(self: CausalLM, batch: dict, index: int) -> torch.Tensor:
        if self.trainer.global_step == 3:
            raise RuntimeError("the power went")
        return step(self, batch, index)

    monkeypatch.setattr(CausalLM, "training_step", breaks)
    with pytest.raises(RuntimeError, match="the power went"):
        train(base, tmp_path / "broken", *changes)
    monkeypatch.undo()
    broken = train(base, tmp_path / "broken", *changes)
    for name in ("loss", "grad_norm", "val_loss"):
        assert column(broken, name) == column(whole, name) and column(whole, "loss")
    assert column(whole, "loss") != column(train(base, tmp_path / "dry"), "loss")


def test_a_checkpoint_of_other_adapters_or_of_whole_weights_is_refused(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    more = [f"resume={trained}", "trainer.max_steps=6", "trainer.limit_val_batches=0"]
    assert column(train(base, tmp_path / "on", *more), "step") == [5, 6]
    for change, name in ("model.lora.r=8", "lora_A"), ("model.lora=null", "lm_head"):
        with pytest.raises(ValueError, match=f"the checkpoint is of another model: .*({name}).* Give the model"):
            train(base, tmp_path / "other", *more, change)
        shutil.rmtree(tmp_path / "other")
    with pytest.raises(ValueError, match="its run has model.lora.alpha=16 and this one 400, by which its adapters"):
        train(base, tmp_path / "other", *more, "model.lora.alpha=400")
    with pytest.raises(ValueError, match="trained no adapters .model.lora., so there is nothing to merge"):
        plain = ["model.lora=null", "trainer.max_steps=1", "trainer.limit_val_batches=0"]
        export(train(base, tmp_path / "plain", *plain), tmp_path / "whole", merge=True)


@pytest.mark.parametrize("setting", ["model.checkpointing=attention_saved", "model.fused_loss=false"])
def test_how_it_is_computed_changes_no_step(base: Path, trained: Path, tmp_path: Path, setting: str) -> None:
    out = train(base, tmp_path / "out", "trainer.limit_val_batches=0", setting)
    for name in ("loss", "grad_norm"):
        assert column(out, name) == pytest.approx(column(trained, name), rel=1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_adapted_layers_compile_whole(base: Path, tmp_path: Path) -> None:
    once = ["attention=sage_int8", "trainer.limit_val_batches=0", "trainer.max_steps=1"]
    plain, compiled = (train(base, tmp_path / how, *once, f"model.compile={how}") for how in ("false", "true"))
    for name in ("loss", "grad_norm"):  # INT8 may round to the neighbour
        assert column(compiled, name) == pytest.approx(column(plain, name), rel=2e-3)
    info = json.loads((compiled / "run.json").read_text())
    assert info["compile_s"] > 0 and info["graph_breaks"] == []


def test_the_probe_drops_the_same_under_both_attentions(base: Path, tmp_path: Path) -> None:
    changes = ["attention=sage_int8", "model.lora.dropout=0.5", "probe.every=2", "trainer.limit_val_batches=0"]
    out = train(base, tmp_path / "out", *changes)
    cosines = column(out, "probe/grad_cosine")
    assert len(cosines) == 2 and all(0.99 < cosine < 1.0 for cosine in cosines)
    assert column(out, "loss") == column(train(base, tmp_path / "off", *changes, "probe.every=0"), "loss")


def test_the_room_asked_for_is_that_of_adapters(base: Path, trained: Path, tmp_path: Path, monkeypatch) -> None:
    """Three checkpoints, each with AdamW's two moments; kept weights are adapters too."""
    size = 4 * json.loads((trained / "run.json").read_text())["trained_parameters"]
    usage = shutil.disk_usage(tmp_path)
    changes = ["checkpoint.keep=weights", "trainer.limit_val_batches=0"]
    for free, enough in ((10 * size - 1, False), (10 * size, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if enough:
            train(base, tmp_path / "out", *changes)
        else:
            with pytest.raises(OSError, match="no room for the checkpoints"):
                train(base, tmp_path / "out", *changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.lora=16", "model.lora: 16 is none of r, alpha, dropout, target_modules: give null, or"),
        ("model.lora.rank=4", "model.lora: rank is none of r, alpha"),
        ("model.lora.r=0", "model.lora.r=0: give a whole number, at least 1"),
        ("model.lora.r=1.5", "model.lora.r=1.5: give a whole"),
        ("model.lora.alpha=-1", "model.lora.alpha=-1: give a number above 0"),
        ("model.lora.dropout=1", "model.lora.dropout=1: give a number from 0 to below 1"),
        ("model.lora.target_modules=3", "model.lora.target_modules=3: give all-linear or names"),
        ("model=quickstart", "model.lora adapts weights that are there already: give model.path="),
        ("model.linear=float8", "model.lora does not go with model.linear=float8"),
    ],
)
def test_what_adapters_cannot_be(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        options(compose(["recipe=gsm8k_finetune", "model.lora={r: 4}", change]).model)
    assert is_bad_input(caught.value)


def test_what_adapters_are_where_little_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = compose(["recipe=gsm8k_finetune", "model.lora.r=4"])
    assert options(asked.model) == {"r": 4, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
    assert options(compose(["recipe=gsm8k_finetune", "model.lora={}"]).model)["r"] == 16
    assert options(compose(["recipe=gsm8k_finetune"]).model) is None
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"model.lora: no package peft: pip install 'sagetrain\[lora\]'"):
        check_settings(asked)


def test_adapters_of_which_nothing_is_said(base: Path, tmp_path: Path) -> None:
    quick = ["trainer.max_steps=1", "trainer.limit_val_batches=0", "checkpoint.keep=last"]
    out = train(base, tmp_path / "out", "model.lora=null", "model.lora={}", *quick)
    assert (export(out, tmp_path / "whole", merge=True) / "model.safetensors").exists()
    assert load(out)[0].peft_config["default"].r == 16


def test_layers_by_name(base: Path, tmp_path: Path) -> None:
    quick = ["trainer.max_steps=1", "trainer.limit_val_batches=0", "checkpoint.keep=weights"]
    out = train(base, tmp_path / "out", "model.lora.target_modules=[q_proj,v_proj]", *quick)
    names = load_file(out / "weights" / "adapter_model.safetensors")
    assert len(names) == 2 * 2 * 2 and all("q_proj" in name or "v_proj" in name for name in names)
    with pytest.raises(ValueError, match="model.lora.target_modules: the model has no nowhere$") as caught:
        train(base, tmp_path / "other", "model.lora.target_modules=[q_proj,nowhere]", *quick)
    assert is_bad_input(caught.value)


def test_adapters_of_tied_embeddings_are_not_merged(base: Path, tmp_path: Path) -> None:
    """They would change what reads tokens as well as what says them."""
    lora = {"r": 2, "alpha": 4, "dropout": 0.0}
    for layer, refused in (("lm_head", True), ("q_proj", False)):
        model = AutoModelForCausalLM.from_pretrained(base)
        assert model.config.tie_word_embeddings
        adapt(model, lora | {"target_modules": [layer]}, 0)
        save(model, dict(model.named_parameters()), tmp_path / layer)
        raises = pytest.raises(ValueError, match="adapters change lm_head.*Export without --merge")
        with raises if refused else nullcontext():
            merge(str(base), model.config, tmp_path / layer, tmp_path / f"{layer}-merged")


def test_every_strategy_trains_and_saves_the_same_adapters(base: Path, trained: Path, tmp_path: Path) -> None:
    """Two ranks. Of each run both the weights that it gathers and the checkpoint of its last step are read."""
    more = ["trainer.devices=2", "data.batch_size=2", "checkpoint.keep=weights", "checkpoint.every_n_steps=4"]
    train_each([command(base, *more, *how, f"out={tmp_path / name}") for name, how in STRATEGIES.items()], tmp_path)
    for name in STRATEGIES:
        for what in ("loss", "grad_norm", "val_loss"):
            assert column(tmp_path / name, what) == pytest.approx(column(trained, what), rel=1e-4), (name, what)
        (last,) = (tmp_path / name / "checkpoints").glob("step-*")
        folders = tmp_path / name / "weights", export(last, tmp_path / f"{name}-read")
        written, read = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        assert len(read) == 28 and read.keys() == written.keys()
        assert all(torch.equal(read[each], written[each]) for each in read)
