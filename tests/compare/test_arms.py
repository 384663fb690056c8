"""sagetrain.compare: which runs are one arm, which arm is the baseline, and where speeds are given no ratio."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sagetrain.compare import Comparison, find_runs, report
from sagetrain.compare.__main__ import main
from tests.compare.test_compare import falling, printed, write_run

DENSE = "a dense mask, so SDPA computed what the mask hides"


def lr_run(parent: Path, lr: float, seed: int = 0, arm: str = "bf16", end: float = 2.0, **more) -> Path:
    """A run that differs from others in the learning rate."""
    config = {"optim": {"lr": lr, "betas": [0.9, 0.95]}} | more.pop("config", {})
    return write_run(parent / f"lr{lr}", arm, seed, falling(end), config=config, **more)


def names(comparison: Comparison) -> list[str]:
    return [arm.name for arm in comparison.arms]


def test_a_setting_that_differs_makes_an_arm(tmp_path: Path):
    for seed in (0, 1):
        lr_run(tmp_path, 0.01, seed, end=2.1 + seed / 100)
        lr_run(tmp_path, 0.001, seed, end=2.0 + seed / 50)
    comparison = report([tmp_path / "lr0.01", tmp_path / "lr0.001"], tmp_path / "out")
    assert names(comparison) == ["bf16 optim.lr=0.01", "bf16 optim.lr=0.001"]  # the first that was given comes first
    (arm,) = comparison.others
    assert arm.pairs == [0, 1] and arm.gap == pytest.approx(-0.095) and comparison.band == pytest.approx(0.01)
    assert comparison.mismatches == []  # the names say what differs
    assert comparison.sentences()[0].startswith(
        "BF16 optim.lr=0.001 (SDPA flash) ends lower than BF16 optim.lr=0.01 (SD"
    )
    assert "optim.lr=0.001" in printed(comparison) and "optim.lr=0.001" in (tmp_path / "out/report.html").read_text(
        "utf-8"
    )
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"))
    assert list(numbers["runs"]) == [f"bf16 optim.lr={lr}-seed{seed}" for lr in (0.01, 0.001) for seed in (0, 1)]
    for asked in ("bf16 optim.lr=0.001", "BF16 optim.lr=0.001 (SDPA flash)"):
        assert (
            Comparison(find_runs([tmp_path / "lr0.01", tmp_path / "lr0.001"]), asked).arms[0].name
            == "bf16 optim.lr=0.001"
        )
    with pytest.raises(
        ValueError, match="several runs of the baseline arm 'bf16'; these runs have the arms bf16 optim.lr"
    ):
        Comparison(find_runs([tmp_path]), "bf16")


def test_the_baseline_is_bf16_or_the_first_that_is_not_int8(tmp_path: Path):
    write_run(tmp_path, "sage_int8", 0, falling(2.0))
    alone = Comparison(find_runs([tmp_path]))
    assert alone.baseline == "sage_int8" and alone.others == [] and "no other arm" in alone.sentences()[0]
    fa2, flex = (write_run(tmp_path, arm, 0, falling(2.1)) for arm in ("fa2", "flex"))
    assert Comparison(find_runs([tmp_path])).baseline == "fa2"
    assert Comparison(find_runs([tmp_path / "sage_int8-seed0", flex, fa2])).baseline == "flex"
    write_run(tmp_path, "bf16", 0, falling(2.1))
    assert [arm.name for arm in Comparison(find_runs([tmp_path])).arms] == ["bf16", "fa2", "flex", "sage_int8"]
    chosen = Comparison(find_runs([tmp_path]), "sage_int8")
    assert chosen.arms[0].name == "sage_int8" and chosen.others[0].gap == pytest.approx(0.1)


def test_runs_of_other_settings_are_no_seeds_of_one_arm(tmp_path: Path):
    lr_run(tmp_path, 0.01, 0)
    lr_run(tmp_path, 0.001, 1)
    comparison = Comparison(find_runs([tmp_path]))
    assert names(comparison) == ["bf16 optim.lr=0.001", "bf16 optim.lr=0.01"] and comparison.band is None
    assert "no seed in common" in comparison.sentences()[0]


def test_every_arm_says_what_tells_some_apart(tmp_path: Path):
    """Learning rates differ within INT8: the name of the BF16 arm has its learning rate too."""
    lr_run(tmp_path, 0.01)
    for lr in (0.01, 0.001):
        lr_run(tmp_path, lr, arm="sage_int8")
    comparison = Comparison(find_runs([tmp_path]))
    assert names(comparison) == ["bf16 optim.lr=0.01", "sage_int8 optim.lr=0.001", "sage_int8 optim.lr=0.01"]
    assert comparison.mismatches == []
    assert comparison.label("sage_int8 optim.lr=0.01") == "INT8 optim.lr=0.01"


def test_how_often_a_run_is_validated_makes_no_arm(tmp_path: Path):
    """What differs only in when it was looked at is one experiment; how much of the data was looked at is another."""
    for name, other in (
        ("val_check_interval", ["bf16"]),
        ("limit_val_batches", ["bf16 trainer.limit_val_batches=8", "bf16 trainer.limit_val_batches=9"]),
    ):
        runs = [
            write_run(tmp_path / f"{name}{value}", "bf16", seed, falling(2.0), config={"trainer": {name: value}})
            for seed, value in enumerate((8, 9))
        ]
        assert names(Comparison(find_runs(runs))) == other


def test_a_setting_that_differs_between_attentions_is_no_arm(tmp_path: Path):
    lr_run(tmp_path, 0.01)
    lr_run(tmp_path, 0.001, arm="sage_int8")
    comparison = Comparison(find_runs([tmp_path]))
    assert names(comparison) == ["bf16", "sage_int8"]
    assert comparison.mismatches == ["optim.lr differs: 0.01 (bf16-seed0); 0.001 (sage_int8-seed0)"]


def test_other_data_is_said_although_it_makes_arms(tmp_path: Path):
    for tokens, width in (64, 64), (128, 128):
        write_run(tmp_path / str(width), "bf16", 0, falling(2.0), tokens=tokens, config={"data": {"seq_len": width}})
    comparison = Comparison(find_runs([tmp_path]))
    assert names(comparison) == ["bf16 data.seq_len=128", "bf16 data.seq_len=64"]
    assert comparison.sentences()[0].startswith("These runs are not the same experiment")
    assert [text.partition(" differs")[0] for text in comparison.mismatches] == [
        "number of tokens up to step 20", "data.seq_len"]  # fmt: skip


def test_many_differences_get_a_number_and_a_line(tmp_path: Path):
    for i in range(2):
        lr_run(tmp_path, 0.1 + i, config={"trainer": {"max_steps": 20, "plugins": f"{i}" * 70}})
    comparison = Comparison(find_runs([tmp_path]))
    assert names(comparison) == ["bf16 #1", "bf16 #2"]
    assert comparison.notes[0] == f"#1 is optim.lr=0.1, trainer.plugins={'0' * 70}"
    assert comparison.notes[1] == f"#2 is optim.lr=1.1, trainer.plugins={'1' * 70}"


def test_the_same_settings_on_two_machines(tmp_path: Path):
    for name, device, commit in ("a", "H100", "1" * 40), ("b", "H200", "2" * 40):
        write_run(tmp_path / name, "bf16", 0, falling(2.0), device=device, git_commit=commit)
    comparison = Comparison(find_runs([tmp_path]))
    assert names(comparison) == ["bf16 device=H100, commit=11111111", "bf16 device=H200, commit=22222222"]
    assert comparison.others[0].speed_ratio is None
    assert "No speed ratio between different devices: H100; H200." in comparison.sentences()


@pytest.mark.parametrize("asked", [None, "sage_int8"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention": "SDPA with a dense mask", "handicap": DENSE}, f"BF16 (SDPA with a dense mask): {DENSE}"),
        ({"attention": "SDPA math", "handicap": "math"}, "BF16 (SDPA math): math"),
        ({"attention": None, "handicap": None}, None),
    ],
)
def test_a_handicapped_baseline_gives_no_ratio(tmp_path: Path, changes: dict, reason: str | None, asked: str | None):
    for arm in ("bf16", "sage_int8"):
        write_run(tmp_path, arm, 0, falling(2.0), **(changes if arm == "bf16" else {}))
    comparison = report([tmp_path], tmp_path / "out", asked)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"))
    shown = " ".join([*comparison.sentences(), *printed(comparison).split(), *page.split()])
    ratios = [arm["speed_ratio"] for arm in numbers["arms"].values()]
    if reason is None:
        assert "times the speed" in shown and any(ratios) and "No speed ratio" not in shown
    else:
        assert "times the speed" not in shown and "2.00x" not in shown and "0.50x" not in shown and not any(ratios)
        assert comparison.sentences()[-1] == f"No speed ratio with {reason}."
        assert f"No speed ratio with {reason}." in page and reason in numbers["verdict"][-1]


def test_a_record_that_does_not_tell_gives_no_ratio(tmp_path: Path):
    for arm in ("bf16", "sage_int8"):
        path = write_run(tmp_path, arm, 0, falling(2.0)) / "run.json"
        info = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps({k: v for k, v in info.items() if k not in ("attention", "handicap")}), "utf-8")
    comparison = report([tmp_path], tmp_path / "out")
    assert comparison.others[0].speed_ratio is None
    assert (
        comparison.sentences()[-1] == "No speed ratio with BF16 (sdpa): its record does not tell how its attention ran."
    )


def test_a_scheme_of_ones_own_is_named_once(tmp_path: Path):
    for seed, lr in enumerate((0.1, 0.2)):
        config = {"optim": {"lr": lr}}
        write_run(tmp_path, "mine", seed, falling(2.0), attention="mine (triton)", config=config)
    comparison = Comparison(find_runs([tmp_path]))
    labels = [comparison.label(arm.name) for arm in comparison.arms]
    assert labels == ["mine optim.lr=0.1 (triton)", "mine optim.lr=0.2 (triton)"]


@pytest.mark.parametrize(
    ("attention", "kernel", "label"),
    [
        ("mine (triton)", "mine (reference)", "mine (triton, reference)"), ("mine (triton)", "triton", "mine (triton)"),
        ("mine", "mine", "mine"), ("mine ", "yours (x) (y)", "mine (mine , yours (x) (y))"),
    ],
)  # fmt: skip
def test_what_ran_behind_an_arm(tmp_path: Path, attention: str, kernel: str, label: str):
    """Of two runs, the second with the record of old runs, which have `kernel` alone."""
    write_run(tmp_path, "mine", 0, falling(2.0), attention=attention)
    write_run(tmp_path, "mine", 1, falling(2.0), attention=None, kernel=kernel)
    assert Comparison(find_runs([tmp_path])).label("mine") == label


def test_a_record_with_the_least(tmp_path: Path):
    path = write_run(tmp_path, "bf16", 0, falling(2.0)) / "run.json"
    least = {"recipe": "r", "arm": "bf16", "seed": 0, "status": "finished", "steps": 20}
    path.write_text(json.dumps(least), "utf-8")
    (path.parent / "config.yaml").unlink()
    assert report([tmp_path], tmp_path / "out").label("bf16") == "BF16"


def test_only_the_handicapped_arm_loses_its_ratio(tmp_path: Path):
    for arm, handicap in ("bf16", None), ("sage_int8", None), ("sdpa", DENSE):
        write_run(tmp_path, arm, 0, falling(2.0), handicap=handicap)
    comparison = Comparison(find_runs([tmp_path]))
    assert {arm.name: arm.speed_ratio for arm in comparison.others} == {"sage_int8": 2.0, "sdpa": None}
    assert comparison.sentences()[-1] == f"No speed ratio with sdpa (SDPA flash): {DENSE}."


def test_equal_runs_of_unequal_speed_give_no_ratio(tmp_path: Path):
    for arm, speeds in ("bf16", (100.0, 300.0)), ("sage_int8", (240.0, 250.0)):
        for seed, speed in enumerate(speeds):
            write_run(tmp_path, arm, seed, falling(2.0), columns={"tokens_per_s": [speed] * len(falling(2.0))})
    comparison = Comparison(find_runs([tmp_path]))
    assert comparison.others[0].speed_ratio is None
    assert "equal runs differs by up to 3.00 times" in " ".join(comparison.sentences())


def test_another_number_of_devices_gives_no_ratio(tmp_path: Path):
    write_run(tmp_path, "bf16", 0, falling(2.0))
    write_run(tmp_path, "sage_int8", 0, falling(2.0), config={"trainer": {"devices": 2, "max_steps": 20}})
    comparison = Comparison(find_runs([tmp_path]))
    assert comparison.others[0].speed_ratio is None
    assert comparison.sentences()[-1] == "No speed ratio between different devices: cpu; cpu, trainer.devices=2."


SHOWS = """
import contextlib, sys
from sagetrain.compare.__main__ import main
runs, gone, shown = sys.argv[1:]
for encoding in ("ascii", "latin-1", "utf-8"):
    with contextlib.ExitStack() as stack:
        for name in "stdout", "stderr":
            file = stack.enter_context(open(f"{shown}/{name}.{encoding}", "w", encoding=encoding))
            stack.enter_context(getattr(contextlib, f"redirect_{name}")(file))
        done = main([runs]), main([gone])
    assert done == (0, 2), (encoding, done)
"""


@pytest.mark.parametrize(("locale", "names"), [({}, "utf-8"), ({"LC_ALL": "C"}, "ascii")])  # C: no path is text
def test_any_terminal_shows_a_finished_comparison(tmp_path: Path, locale: dict[str, str], names: str):
    parent = tmp_path / "läufe 東京 [red] :smile:"
    for arm in ("bf16", "sage_int8"):
        write_run(parent, arm, 0, falling(2.0), recipe="größe [b]東京[/b]", command="python \udce4")  # no text at all
    environment = os.environ | {"PYTHONUTF8": "0", "COLUMNS": "200"} | locale
    command = [sys.executable, "-c", SHOWS, parent, parent / "東京 [red]", tmp_path]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "東京" in (parent / "report.html").read_text("utf-8")
    for encoding in ("ascii", "latin-1", "utf-8"):
        assert (tmp_path / f"stderr.{encoding}").read_bytes().startswith(b"sagetrain: error: no such directory")
        said = (tmp_path / f"stdout.{encoding}").read_text(encoding)
        page = os.fsencode(parent / "report.html").decode(names, "surrogateescape")
        for text in ("größe [b]東京[/b], step 20", f"report: {page}"):
            assert text.encode(encoding, "replace").decode(encoding) in said


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run(tmp_path / "runs", "bf16", 0, falling(2.0))
    assert main(["~/runs", "--out", "~/report"]) == 0 and (tmp_path / "report" / "report.html").exists()
    assert report(["~/runs"], "~/again").baseline == "bf16" and (tmp_path / "again" / "report.html").exists()
    assert main(["~/runs"]) == 0 and (tmp_path / "runs" / "report.html").exists()


def test_the_unexpected_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A ValueError that no check made is none of the user's."""
    write_run(tmp_path / "runs", "bf16", 0, falling(2.0))
    monkeypatch.setattr("sagetrain.compare.__main__.report", lambda *_: int("a slip of ours"))
    with pytest.raises(ValueError, match="a slip of ours"):
        main([str(tmp_path / "runs")])
    assert capsys.readouterr().err == ""
