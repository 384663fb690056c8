"""Settings that are no choice, no whole number or out of range are refused, in a line that says what may stand."""

import pytest
import torch

from sagetrain.__main__ import compose
from sagetrain.errors import is_bad_input
from sagetrain.paths import groups, recipes
from sagetrain.training.checks import check_settings

RUN = "recipe=quickstart"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.fused_loss='false'", "model.fused_loss=false: choose auto, true or false"),
        ("model.compile=1", "model.compile=1: choose true or false"),
        ("model.checkpointing=some", "model.checkpointing=some: choose none, attention_saved or full"),
        ("model.checkpoint_every=1.5", "model.checkpoint_every=1.5: give a whole number, at least 1"),
        ("model.checkpoint_every=0", "model.checkpoint_every=0: give a whole number, at least 1"),
        ("model.checkpoint_every=true", "model.checkpoint_every=true: give a whole number"),
        ("model.linear=int4", "model.linear=int4: choose float8 or null"),
        ("optim.kind=sgd", "optim.kind=sgd: choose adamw or adamw8bit"),
        ("optim.schedule=null", "optim.schedule=null: choose cosine, linear or wsd"),
        ("optim.decay_steps=-5", "optim.decay_steps=-5: give a whole number, at least 0"),
        ("optim.warmup_steps=null", "optim.warmup_steps=null: give a whole number, at least 0"),
        ("optim.lr=fast", "optim.lr=fast: give a number, 0 or more"),
        ("optim.lr=nan", "optim.lr=nan: give a number"),
        ("optim.weight_decay=-1", "optim.weight_decay=-1: give a number, 0 or more"),
        ("optim.min_lr_ratio=2", "optim.min_lr_ratio=2: give a number from 0 to 1"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: give two numbers"),
        ("optim.betas=[0.9,1]", "optim.betas=[0.9, 1]: give two numbers"),
        ("probe.max_tokens=0", "probe.max_tokens=0: give a whole number, at least 1"),
        ("checkpoint.every_n_steps=x", "checkpoint.every_n_steps=x: give a whole number, at least 0"),
        ("compare.arms=[bf16,bf16]", "compare.arms=[bf16,bf16]: name each arm once"),
        ("compare.seeds=1.5", "compare.seeds=1.5: give a whole number, at least 1"),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5: give a whole number"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1: give a number, 0 or more"),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps=0: give a whole number, at least 1"),
        ("seed=abc", "seed=abc: give a whole number, at least 0"),
    ],
)
def test_refusals(setting: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_settings(compose([RUN, setting]))
    assert str(caught.value).startswith(said) and is_bad_input(caught.value)


@pytest.mark.parametrize(("capability", "works"), [(None, False), ((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_float8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch, capability: tuple | None, works: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    cfg = compose([RUN, "model.linear=float8"])
    if works:
        return check_settings(cfg)
    with pytest.raises(ValueError, match="model.linear=float8: needs a GPU of compute capability 8.9 or later"):
        check_settings(cfg)


@pytest.mark.parametrize("choice", [[], *([f"memory={name}"] for name in groups()["memory"])])
@pytest.mark.parametrize("recipe", recipes())
def test_what_recipes_say_passes(recipe: str, choice: list[str]) -> None:
    check_settings(compose([f"recipe={recipe}", *choice]))


@pytest.mark.parametrize(
    "setting",
    ["optim.decay_steps=10", "optim.lr=0", "model.fused_loss=true", "optim.lr=1", "trainer.gradient_clip_val=null"],
)
def test_what_may_be_said_passes(setting: str) -> None:
    check_settings(compose([RUN, setting]))
