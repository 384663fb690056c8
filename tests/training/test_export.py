"""What a run learned goes back to transformers; what a finished run keeps is what was asked for."""

import json
import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sagetrain.__main__ import compose
from sagetrain.export import main
from sagetrain.training.export import export
from sagetrain.training.train import run
from tests.ranks import train_each
from tests.tiny import ARMS, RUN

TINY = [
    *RUN,
    "trainer.limit_val_batches=2",
    "trainer.val_check_interval=2",
    "data.val_documents=4",
    "optim.warmup_steps=0",
    "optim.lr=0.01",
]


STRATEGIES = {"deepspeed0": ["strategy=deepspeed", "strategy.stage=0"]}
STRATEGIES |= {name: [f"strategy={name}"] for name in ("ddp", "fsdp2")}
STRATEGIES |= {f"deepspeed{stage}": ["strategy=deepspeed", f"strategy.stage={stage}"] for stage in (2, 3)}


def documents(folder: Path) -> str:
    lines = (json.dumps({"text": f"{i} and {i} is {i + i}. " * 5}) + "\n" for i in range(300))
    (folder / "docs.jsonl").write_text("".join(lines))
    return f"data.path={folder / 'docs.jsonl'}"


@pytest.fixture
def text(tmp_path: Path) -> str:
    return documents(tmp_path)


def last_loss(out: Path) -> float:
    """Of validation, after the last step."""
    lines = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
    return float(lines[-1][lines[0].index("val_loss")])


def validation_loss(model: torch.nn.Module, text: str) -> float:
    """As the run measures it, by transformers alone."""
    import sagetrain.data

    cfg = compose([*TINY, text])
    tokenizer = sagetrain.data.build_tokenizer("byte")
    stream = sagetrain.data.build(cfg.data, tokenizer, cfg.data.seq_len, cfg.seed, cfg.data.batch_size).stream
    losses, counts = [], []
    with torch.no_grad():
        for batch in stream.validation(0, 1)[:2]:
            losses.append(float(model(**batch).loss))
            counts.append(int((batch["labels"][:, 1:] != -100).sum()))
    return sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keep", ["last", "weights"])
def test_from_pretrained_reads_what_was_trained(tmp_path: Path, text: str, tied: bool, keep: str) -> None:
    change = f"model.config.tie_word_embeddings={tied}"
    (out,) = run(compose([*TINY, text, change, f"checkpoint.keep={keep}", f"out={tmp_path / 'out'}"]))
    assert (out / "checkpoints").exists() == (keep == "last") and (out / "weights").exists() == (keep == "weights")
    model = AutoModelForCausalLM.from_pretrained(export(out, tmp_path / "model"))
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    assert validation_loss(model, text) == pytest.approx(last_loss(out), rel=1e-5)
    for config in model.config, model.generation_config:  # of the byte tokenizer, not transformers' 1 and 2
        assert (config.bos_token_id, config.eos_token_id) == (None, 256)
    if keep == "weights":
        AutoModelForCausalLM.from_pretrained(out / "weights")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs on two ranks, one for each of `STRATEGIES`, with their weights and their last checkpoint."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [*TINY, documents(folder), "trainer.devices=2", "data.batch_size=1"]
    command += ["checkpoint.keep=weights", "checkpoint.every_n_steps=2"]
    command += ["resume=never"]  # the other rank comes when the leading one has written its config.yaml already
    train_each([[*command, *how, f"out={folder / name}"] for name, how in STRATEGIES.items()], folder)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_of_every_strategy_on_two_ranks(tmp_path: Path, two_ranks: Path, strategy: str) -> None:
    """What keep=weights gathers from the ranks must be what export reads out of a checkpoint of the same step."""
    written = AutoModelForCausalLM.from_pretrained(two_ranks / strategy / "weights").state_dict()
    (checkpoint,) = (two_ranks / strategy / "checkpoints").glob("step-*")
    read = AutoModelForCausalLM.from_pretrained(export(checkpoint, tmp_path / "model")).state_dict()
    assert read.keys() == written.keys() and all(torch.equal(read[name], written[name]) for name in read)


@pytest.mark.parametrize("umask", [0o027, 0o077])
def test_weights_are_as_readable_as_other_files(tmp_path: Path, text: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        (out,) = run(compose([*TINY, text, "checkpoint.keep=weights", f"out={tmp_path / 'out'}"]))
        for file in out / "weights" / "model.safetensors", out / "weights" / "config.json":
            assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
        (out / "weights" / "model.safetensors").chmod(0o600)  # of an older run
        (folder := tmp_path / "model").mkdir()
        assert stat.S_IMODE((export(out, folder) / "model.safetensors").stat().st_mode) == 0o666 & ~umask
    finally:
        os.umask(before)


def test_the_tokenizer_comes_along_and_its_end_of_text(tmp_path: Path, text: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<eos>": 0, "<unk>": 1, "and": 2, "is": 3, ".": 4} | {str(i): 5 + i for i in range(250)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "words")
    changes = [f"model.tokenizer={tmp_path / 'words'}", "+model.config.eos_token_id=128001"]  # as model=llama1b
    (out,) = run(compose([*TINY, text, *changes, f"out={tmp_path / 'out'}"]))
    folder = export(out, tmp_path / "model")
    config = AutoConfig.from_pretrained(folder)
    assert (config.bos_token_id, config.eos_token_id) == (None, 0)
    assert (
        AutoTokenizer.from_pretrained(folder)("7 and 7 is 14.")["input_ids"] == tokenizer("7 and 7 is 14.")["input_ids"]
    )


def test_the_command_and_what_it_refuses(tmp_path: Path, text: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (out,) = run(compose([*TINY, text, f"out={tmp_path / 'out'}"]))
    assert main(["~/out", "~/model"]) == 0 and (tmp_path / "model" / "config.json").exists()
    assert f"written: {tmp_path / 'model'}" in capsys.readouterr().out
    for arguments, said in (
        (["~/out", "~/model"], "is not empty: choose another folder"),
        (["~/gone", "~/new"], "is no run"),
    ):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    (out / "checkpoints" / "last.ckpt").unlink()
    assert main(["~/out", "~/new"]) == 2 and "holds no checkpoint" in capsys.readouterr().err


def test_keep_none_leaves_nothing_and_without_intervals_nothing_is_ever_written(
    tmp_path: Path, text: str, monkeypatch
) -> None:
    from sagetrain.training.checkpoint import Checkpoint

    saves = []
    publish = Checkpoint._publish
    monkeypatch.setattr(Checkpoint, "_publish", lambda self, a, b, c: (saves.append(b.name), publish(self, a, b, c)))
    (out,) = run(compose([*TINY, text, "checkpoint.keep=none", "checkpoint.every_n_steps=1", f"out={tmp_path / 'a'}"]))
    assert saves == ["step-00000001.ckpt", "step-00000002.ckpt"] and not (out / "checkpoints").exists()
    never = ["checkpoint.keep=none", "checkpoint.every_n_steps=0", "checkpoint.every_minutes=0"]
    (out,) = run(compose([*TINY, text, *never, f"out={tmp_path / 'b'}"]))
    assert len(saves) == 2 and {p.name for p in out.iterdir()} == {".lock", "config.yaml", "metrics.csv", "run.json"}
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    for run_of_it in run(compose([*ARMS, *TINY[len(RUN) :], text, f"out={tmp_path / 'c'}"])):
        assert not (run_of_it / "checkpoints").exists()
    with pytest.raises(ValueError, match="checkpoint.keep=all: choose one of last, weights, none"):
        run(compose([*TINY, text, "checkpoint.keep=all", f"out={tmp_path / 'd'}"]))


def test_a_signal_does_not_cut_off_the_weights_that_are_all_that_stays(tmp_path: Path, text: str, monkeypatch) -> None:
    from sagetrain.training import checkpoint

    save = checkpoint.save_weights

    def save_weights(*arguments) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save_weights", save_weights)
    (out,) = run(compose([*TINY, text, "checkpoint.keep=weights", f"out={tmp_path / 'out'}"]))
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    AutoModelForCausalLM.from_pretrained(out / "weights")


@pytest.mark.parametrize(
    ("changes", "weights"),  # how many times the weights have to fit on the disk
    [
        ([], 9),  # three checkpoints, each with AdamW's two moments
        (["checkpoint.every_n_steps=0", "checkpoint.every_minutes=0"], 3),
        (["checkpoint.every_n_steps=0", "checkpoint.every_minutes=0", "checkpoint.keep=weights"], 1),
        (["checkpoint.every_n_steps=0", "checkpoint.every_minutes=0", "checkpoint.keep=none"], 0),
        (["checkpoint.keep=none"], 9),
        (["checkpoint.keep=weights"], 10),
    ],
)
def test_the_room_asked_for_is_what_will_be_written(
    tmp_path: Path, text: str, monkeypatch, changes: list[str], weights: int
) -> None:
    import shutil

    (first,) = run(compose([*TINY, text, f"out={tmp_path / 'first'}"]))
    size = 4 * json.loads((first / "run.json").read_text())["parameters"]
    usage = shutil.disk_usage(tmp_path)
    command = compose([*TINY, text, *changes, f"out={tmp_path / 'out'}"])
    if weights:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=weights * size - 1))
        with pytest.raises(OSError, match=r"no room .*checkpoint.keep=none"):
            run(command)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=weights * size))
    run(command)
