"""The command line: one clear line for what cannot work, and a run from any directory without stray files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Trainer

from sagetrain.__main__ import compose, main
from sagetrain.data import build_tokenizer
from sagetrain.errors import asked_for, is_bad_input, one_line
from sagetrain.paths import PACKAGE_DIR, groups, recipes
from sagetrain.training.module import check_length
from tests.launch import SAGETRAIN, Program
from tests.tiny import MODEL

HERE = os.environ | {"PYTHONPATH": str(PACKAGE_DIR.parent)}  # also where nothing is installed

TINY = [
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    *MODEL,
    "data.seq_len=32",
    "data.batch_size=2",
    "trainer.max_steps=2",
]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Runs the command line in an empty directory; gives (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sagetrain", *arguments])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipe=gsm8k_finetune", "model.path=no/model", "data.path=gone.jsonl"], ["'gone.jsonl' does not exist"]),
        (["trainer.max_steps=2"], ["no recipe given", "recipe=NAME", *recipes()]),
        (["receipe=quickstart"], ["unknown key receipe", "Did you mean recipe"]),
        (["quickstart"], ["did you mean recipe=quickstart"]),
        (["recipe=quickstrat"], ["'recipe/quickstrat'", "Available options", *recipes()]),
        (["recipe=quickstart", "attention=int8"], ["'attention/int8'", "bf16 fa2 fa3 fa4 flex sage_int8 sdpa"]),
        (["recipe=quickstart", "attention=sdpa"], ["attention=sdpa has no part in a comparison", "compare.arms=null"]),
        (["recipe=quickstart", "strategy=fsdp"], ["'strategy/fsdp'", "fsdp2", "deepspeed"]),
        (["recipe=quickstart", "logger=wanbd"], ["'logger/wanbd'", "wandb", "tensorboard"]),
        (["recipe=quickstart", "data=c4"], ["'data/c4'", "fineweb_edu"]),
        (["recipe=quickstart", "optim.learning_rate=1"], ["unknown key optim.learning_rate", "weight_decay"]),
        (["recipe=quickstart", "optin.lr=1"], ["unknown key optin.lr", "Did you mean optim"]),
        (["recipe=quickstart", "trainer.max_step=1"], ["unknown key trainer.max_step", "Did you mean max_steps"]),
        (["recipe=quickstart", "compare=null"], ["compare is a group of keys", "compare.arms"]),
        (["recipe=quickstart", "seed.x=1"], ["seed is a single value"]),
        (["recipe=quickstart", "optim.lr=1,2"], ["optim.lr=1,2", "--multirun"]),
        (["recipe=quickstart", "optim.lr=[1"], ["optim.lr=[1"]),
        (["-m", "recipe=quickstart,quickstrat"], ["'recipe/quickstrat'", "quickstart"]),
        (["-m", "recipe=quickstart", "optim.lr=1,2", "hydra/launcher=nope"], ["'hydra/launcher/nope'", "basic"]),
        (["recipe=quickstart", "compare.arms=[sdpa,fa2]"], ["attention=fa2 needs a CUDA GPU", "attention=bf16 takes"]),
        (["recipe=quickstart", "compare.arms=[bf16,sage]"], ["unknown arm 'sage'", "flex, sage_int8, sdpa"]),
        (["recipe=quickstart", "model.config.hiden_size=64"], ["model.config.hiden_size", "hidden_size"]),
        (["recipe=quickstart", "model.config.hidden_size=wide"], ["model.config: ", "'hidden_size' expected int"]),
        (["recipe=quickstart", "model.config.num_attention_heads=0"], ["model.config: integer modulo by zero"]),
        (["recipe=quickstart", "data.seq_len=5000"], ["5000", "max_position_embeddings=4096"]),
        (["recipe=quickstart", "data.pth=x"], ["data.pth"]),
        (["recipe=quickstart", "data.path=nowhere.txt"], ["nowhere.txt"]),
        (["recipe=quickstart", "resume=gone.ckpt"], ["gone.ckpt", "no checkpoint"]),
        (["recipe=quickstart", "trainer.precision=7"], ["7"]),
        (["recipe=gsm8k_finetune", "model=quickstart", "data.path=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["recipe=quickstart", "memory=8gb"], ["'memory/8gb'", "24gb 80gb"]),
        (["recipe=quickstart", "model.fused_loss=maybe"], ["model.fused_loss=maybe: choose auto, true or false"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    cli, tmp_path: Path, arguments: list[str], said: list[str]
) -> None:
    code, out, err = cli(*arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("sagetrain: error: "), err
    for words in said:
        assert words in err
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_help_lists_recipes_with_what_they_do(cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    for name, text in recipes().items():
        assert f"{name:<20} {text}" in out
    for options in groups().values():
        assert all(option in out for option in options)


def test_no_arguments_lists_recipes(cli) -> None:
    code, out, err = cli()
    assert code == 2 and all(name in out + err for name in recipes())


def test_cfg_shows_the_configuration(cli, tmp_path: Path) -> None:
    code, out, _ = cli("recipe=quickstart", "--cfg", "job", "trainer.accumulate_grad_batches=7")
    assert code == 0 and "recipe: quickstart" in out and "accumulate_grad_batches: 7" in out
    assert list(tmp_path.iterdir()) == []


def test_unlisted_trainer_and_model_keys_pass_through() -> None:
    cfg = compose(["recipe=quickstart", "trainer.overfit_batches=3", "model.config.attention_bias=true"])
    assert cfg.trainer.overfit_batches == 3 and cfg.model.config.attention_bias is True


def test_sweep_trains_from_any_directory_and_writes_only_its_runs(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sagetrain",
        "-m",
        "recipe=quickstart",
        "compare.arms=null",
        "attention=bf16",
        "seed=0,1",
    ]
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 100)
    command += [*TINY, "out=here", "data.path=text.txt"]
    done = subprocess.run(command, cwd=tmp_path, env=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "text.txt"]
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["0", "1", "multirun.yaml"]
    for seed in "01":
        run = tmp_path / "here" / seed
        assert {p.name for p in run.iterdir()} == {".lock", "checkpoints", "config.yaml", "metrics.csv", "run.json"}
        assert len((run / "metrics.csv").read_text().splitlines()) == 3
        assert f'"name": "bf16-seed{seed}"' in (run / "run.json").read_text()


def caught(function, *arguments: object, **options: object) -> Exception:
    try:
        function(*arguments, **options)
    except Exception as error:
        return error
    raise AssertionError("no error")


def test_bad_input_is_what_a_check_raised_and_nothing_else() -> None:
    expected = caught(compose, ["recipe=quickstrat"])
    assert is_bad_input(expected) and "quickstart" in one_line(expected)
    assert is_bad_input(caught(build_tokenizer, "/no/such/tokenizer"))
    assert is_bad_input(caught(Trainer, precision="7"))  # Lightning's check of what the user asked for
    error = caught(
        instantiate, {"_target_": "sagetrain.integrations.lightning.SageDDPStrategy", "attention": "nonsense"}
    )
    assert isinstance(error, InstantiationException) and is_bad_input(error)
    assert one_line(error).startswith("attention='nonsense' is unknown")
    # The same types, but nobody's check: a library, an operation in our own code that failed.
    assert not is_bad_input(caught(torch.nn.Linear(2, 2), torch.zeros(3)))
    assert not is_bad_input(caught(json.loads, "{"))
    assert not is_bad_input(caught(check_length, None, 512))  # AttributeError: a slip of ours

    def library() -> None:
        with asked_for("model.path=x"):
            json.loads("{")

    assert not is_bad_input(caught(json.loads, "{")) and is_bad_input(caught(library))
    assert one_line(caught(library)).startswith("model.path=x: Expecting property name")


UNEXPECTED = """
import sys
from sagetrain.__main__ import main
from sagetrain.training import module
def broken(self, batch, index):
    raise ValueError("zip() argument 2 is longer than argument 1")
module.CausalLM.training_step = broken
main(sys.argv[1:])
"""


def test_the_unexpected_shows_its_traceback_and_run_json_keeps_it(tmp_path: Path) -> None:
    words = ["recipe=quickstart", "compare.arms=null", "attention=bf16", *TINY, "data.path=text.txt", "out=out"]
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 100)
    program = Program(UNEXPECTED, *words, folder=tmp_path)
    assert program.ends() == 1
    said = program.stderr.read_text()
    assert "Traceback" in said and "in broken" in said
    assert "\nValueError: zip() argument 2 is longer than argument 1\n" in said
    info = json.loads((tmp_path / "out" / "run.json").read_text())
    assert info["status"] == "failed" and "in broken" in info["traceback"]
    assert info["error"] == "ValueError: zip() argument 2 is longer than argument 1"


def test_the_doctor_refuses_what_it_does_not_know() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sagetrain.doctor", "--fast"], env=HERE, capture_output=True, text=True
    )
    assert done.returncode == 2 and "unrecognized arguments: --fast" in done.stderr and not done.stdout


FEW = "import sys; sys.stdout.reconfigure(encoding='ascii'); sys.stderr.reconfigure(encoding='ascii')\n"
DOCTOR = "import runpy; runpy.run_module('sagetrain.doctor', run_name='__main__', alter_sys=True)"


def test_a_terminal_of_few_characters_shows_any_name(tmp_path: Path) -> None:
    out = tmp_path / "läufe ☕ [bold]"
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 100)
    words = ["recipe=quickstart", "compare.arms=[bf16,sage_int8]", *TINY]
    words += [f"data.path={tmp_path / 'text.txt'}", f"out='{out}'", "compare.seeds=1"]
    program = Program(FEW + SAGETRAIN, *words, folder=tmp_path)
    assert program.ends() == 0, program.stderr.read_text()
    printed = program.stdout.read_text("ascii")
    assert f"run directory: {str(out).encode('ascii', 'replace').decode()} (after" in printed
    assert (out / "report.html").exists() and "[bold]/report.html" in printed
    assert Program(FEW + DOCTOR, folder=tmp_path).ends() == 0
