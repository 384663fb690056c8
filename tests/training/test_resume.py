"""A run killed at any moment goes on as if nothing had happened; a failed checkpoint costs nothing that was there.

The kills are real: this file, run as a script, trains in forked children and ends them with SIGKILL.
"""

import contextlib
import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.launch import Program

STEPS = 12
RUN = (
    "recipe=quickstart compare.arms=null trainer.accelerator=cpu trainer.precision=32-true probe.every=4 resume=auto "
    "model.config.hidden_size=64 model.config.intermediate_size=64 model.config.num_hidden_layers=1 "
    "model.config.num_attention_heads=1 model.config.num_key_value_heads=1 model.config.attention_dropout=0.0 "
    f"data.seq_len=64 data.batch_size=2 trainer.max_steps={STEPS} checkpoint.every_n_steps=3 "
    "trainer.enable_progress_bar=false trainer.accumulate_grad_batches=2 optim.warmup_steps=4"
).split()


def train(out: Path, *more: str) -> None:
    from sagetrain.__main__ import compose
    from sagetrain.training.train import run

    run(compose([*RUN, f"out={out}", *more]))


def rows(out: Path) -> list[list[str]]:
    """metrics.csv without its timings."""
    lines = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
    timed = [lines[0].index(name) for name in ("tokens_per_s", "step_ms", "data_wait", "mfu", "peak_gib")]
    return [[x for i, x in enumerate(line) if i not in timed] for line in lines]


def slow_disk() -> None:
    """Have a checkpoint lie half written until the end."""
    import torch

    save = torch.save

    def in_two_halves(content: Any, path: Path) -> None:
        file = io.BytesIO()
        save(content, file)
        half = file.tell() // 2
        with open(path, "wb", buffering=0) as out:
            out.write(file.getvalue()[:half])
            time.sleep(600)  # the kill comes
            out.write(file.getvalue()[half:])

    torch.save = in_two_halves


def wait_after(row: int) -> None:
    """Train no further than the step after this row, so that who would kill it then is never late."""
    from sagetrain.training.module import CausalLM

    step = CausalLM.training_step

    def training_step(self: CausalLM, *given: Any) -> Any:
        if self.trainer.global_step > row:
            time.sleep(600)
        return step(self, *given)

    CausalLM.training_step = training_step


def in_child(out: Path, *more: str, kill_at: int | None = None) -> int:
    """kill_at: the row after which this one will be killed; each third of them in a write."""
    pid = os.fork()
    if pid == 0:
        try:
            if kill_at and kill_at % 3 == 0:
                slow_disk()
            elif kill_at:
                wait_after(kill_at)
            train(out, *more)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid


def half_written(out: Path, since: float) -> bool:
    for path in out.glob("checkpoints/.partial-step*"):
        with contextlib.suppress(FileNotFoundError):  # it is whole by now
            if path.stat().st_size and path.stat().st_mtime > since:
                return True
    return False


def killed_again_and_again(folder: Path, data: str) -> None:
    """Train once undisturbed, and once with kills: a moment after a row, or while a checkpoint is half written."""
    os.waitpid(in_child(folder / "whole", data), 0)
    out, chance, kills = folder / "killed", random.Random(0), []
    for row in (1, 3, 5, 6, 8, 9, 11):
        writing, since = row % 3 == 0, time.time()
        pid = in_child(out, data, kill_at=row)
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            written = (out / "metrics.csv").read_text().count("\n") - 1 if (out / "metrics.csv").exists() else 0
            if half_written(out, since) if writing else written >= row:
                time.sleep(0.0 if writing else chance.uniform(0.0, 0.05))
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                if json.loads((out / "run.json").read_text())["status"] == "running":
                    kills.append("in a write" if writing and half_written(out, since) else "in a step")
                break
            time.sleep(0.001)
    assert os.waitpid(in_child(out, data), 0)[1] == 0, "the resumed run failed"
    (folder / "kills").write_text(json.dumps(kills))


def test_killed_run_repeats_the_losses_of_an_undisturbed_one(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(3000)))
    script = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
    assert Program(script, str(tmp_path), f"data.path={text}", folder=tmp_path).ends() == 0
    kills = json.loads((tmp_path / "kills").read_text())
    assert kills.count("in a write") == 3 and kills.count("in a step") >= 3
    whole, killed = (rows(tmp_path / name) for name in ("whole", "killed"))
    assert [line[0] for line in whole[1:]] == [str(i + 1) for i in range(STEPS)]
    assert killed == whole
    info = json.loads((tmp_path / "killed" / "run.json").read_text())
    assert info["status"] == "finished" and info["steps"] == STEPS
    assert sorted(p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()) == [
        "last.ckpt",
        f"step-{STEPS:08d}.ckpt",
    ]


if __name__ == "__main__":
    killed_again_and_again(Path(sys.argv[1]), sys.argv[2])
