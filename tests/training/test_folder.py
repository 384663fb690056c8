"""A run directory: one run at a time, whole files, one name for all ranks, and a command line that names it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sagetrain.__main__ import compose
from sagetrain.errors import is_bad_input
from sagetrain.paths import PACKAGE_DIR
from sagetrain.training import folder
from sagetrain.training.folder import agreed, global_rank, locked, quoted, write
from sagetrain.training.train import run
from tests.tiny import ARMS, RUN

HERE = os.environ | {"PYTHONPATH": str(PACKAGE_DIR.parent), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i} is {i + i}.\n" for i in range(500)))
    return f"data.path={tmp_path / 'text.txt'}"


HOLD = """
import sys, time
from pathlib import Path
from sagetrain.training.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_an_out_that_cannot_be_written_is_bad_input(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out=.*/file/run: .*Not a directory") as refused:
        run(compose([*RUN, text, f"out={tmp_path / 'file' / 'run'}"]))
    assert is_bad_input(refused.value)


@pytest.mark.parametrize("what", [RUN, ARMS], ids=["a run", "a comparison"])
def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_leaves_it_free(
    tmp_path: Path, text: str, what: tuple[str, ...]
) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, env=HERE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=f"in use by another run .process {holder.pid} on .*out=FOLDER"):
            run(compose([*what, text, f"out={tmp_path / 'out'}"]))
        assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]
        holder.kill()
    assert len(run(compose([*RUN, text, f"out={tmp_path / 'out'}"]))) == 1


def test_a_lock_that_came_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "new" / "run"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert (tmp_path / ".lock").exists()  # the folder was there before


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folder.fcntl, "flock", no_locks)
    with locked(tmp_path):
        assert "no lock there (Operation not supported)" in " ".join(capsys.readouterr().err.split())


def test_files_are_whole_or_not_there(tmp_path: Path, text: str, monkeypatch) -> None:
    """A kill between the opening of a file and its last byte: here a write that fails half way."""
    out = tmp_path / "out"
    (first,) = run(compose([*RUN, text, f"out={out}"]))
    config = (first / "config.yaml").read_bytes()
    real = Path.write_bytes

    def torn(path: Path, content: bytes) -> int:
        real(path, content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", torn)
    for name in ("config.yaml", "run.json"):
        with pytest.raises(KeyboardInterrupt):
            write(out / name, "half a file")
    monkeypatch.undo()
    assert (out / "config.yaml").read_bytes() == config and json.loads((out / "run.json").read_text())


def test_config_yaml_is_written_aside(tmp_path: Path, text: str, monkeypatch) -> None:
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(Path(b).name), replace(a, b)))
    run(compose([*RUN, text, f"out={tmp_path / 'out'}"]))
    assert {"config.yaml", "run.json", "metrics.csv", "step-00000002.ckpt", "last.ckpt"} <= set(seen)
    assert OmegaConf.load(tmp_path / "out" / "config.yaml").seed == 0


@pytest.mark.parametrize("value", ["/home/zoé/run", "日本", "end\\\n", "a b\\\\"])
def test_hydra_reads_a_quoted_value_as_it_was(value: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"out={quoted(value)}"])
    assert override.value() == value


@pytest.mark.parametrize("name", ["plain", "my runs", "[v1] (a)", "it's", "back\\slash", "end\\", "a,b=c:{d}$e", "ü~"])
def test_the_printed_argument_can_be_pasted(tmp_path: Path, text: str, capsys, name: str) -> None:
    run(compose([*RUN, text, f"out={quoted(str(tmp_path / name))}", "trainer.max_steps=1"]))
    assert (tmp_path / name / "run.json").exists()
    printed = capsys.readouterr().out
    assert f"run directory: {tmp_path / name} (after" in printed
    words = printed.partition("the same command with ")[2].partition(")\nbf16-seed0: finished")[0]
    (argument,) = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {words}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    assert compose(["recipe=quickstart", argument]).out == str(tmp_path / name)
    assert shlex.split(json.loads((tmp_path / name / "run.json").read_text())["command"])[:3] == [
        "python",
        "-m",
        "sagetrain",
    ]


def test_home_is_expanded_wherever_a_path_is_given(tmp_path: Path, text: str, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    common = [*RUN, "data.path=~/text.txt"]
    (first,) = run(compose([*common, "out=~/runs/a b"]))
    assert first == tmp_path / "runs" / "a b"
    run(compose([*common, "out='~/runs/b'", "resume=~/runs/a b", "trainer.max_steps=3", "data.path=[~/text.txt]"]))
    assert json.loads((tmp_path / "runs" / "b" / "run.json").read_text())["steps"] == 3
    with pytest.raises(ValueError, match=f"model.path={tmp_path}/gone"):
        run(compose([*common, "model=pretrained", "model.path=~/gone", "out=~/runs/c"]))
    assert not (tmp_path / "~").exists()


def test_two_commands_of_one_second_have_two_folders() -> None:
    first, second = (compose(["recipe=quickstart"]).out for _ in range(2))
    assert first != second and re.fullmatch(r"outputs/quickstart/[0-9-]{10}_[0-9-]{8}-\d{6}", first)


def test_ranks_of_a_launcher_agree_on_a_folder(tmp_path: Path, text: str) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sagetrain"]
    command = [sys.executable, *launch, *RUN, text, "strategy=ddp", "trainer.devices=2"]
    done = subprocess.run(command, cwd=tmp_path, env=HERE, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (out,) = (tmp_path / "outputs" / "quickstart").iterdir()
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


def test_tasks_of_slurm_agree_and_others_are_asked(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    assert agreed("outputs/quickstart/now") == "outputs/quickstart/now" and global_rank() == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="out=FOLDER"):
        agreed("outputs/quickstart/now")
    monkeypatch.delenv("WORLD_SIZE")
    for name, value in {"NTASKS": "2", "STEP_ID": "1", "JOB_ID": "7", "PROCID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert agreed("outputs/quickstart/now") == "outputs/quickstart/slurm-7.1" and global_rank() == 1
