"""A damaged checkpoint is found, named and passed over by the run that would have started from it."""

from __future__ import annotations

import shutil

import pytest

import train
from tests.faults.process import assert_same_run, contents
from tests.faults.tiny import STEPS
from zoo.command_line import run_main
from zoo.training.manifest import FILE_NAME


def truncate(checkpoint):
    path = largest(checkpoint)
    path.write_bytes(path.read_bytes()[:-1])
    return path


def flip_a_bit(checkpoint):
    path = largest(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def remove_a_file(checkpoint):
    path = largest(checkpoint)
    path.unlink()
    return path


def remove_the_marker(checkpoint):
    path = checkpoint / FILE_NAME
    path.unlink()
    return path


def largest(checkpoint):
    return max(
        (p for p in checkpoint.rglob("*") if p.is_file() and p.name != FILE_NAME), key=lambda p: p.stat().st_size
    )


def checkpoints_of(workdir):
    """Newest first."""
    return sorted((workdir / "checkpoints").glob("step_*"), reverse=True)


@pytest.mark.parametrize("damages", [(truncate, remove_the_marker), (flip_a_bit, remove_a_file)])
def test_the_previous_checkpoint_is_used_and_the_run_ends_as_if_nothing_had_happened(
    launcher, unbroken, tmp_path, damages
):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    newest = checkpoints_of(workdir)
    assert len(newest) == 3
    damaged = [damage(checkpoint) for damage, checkpoint in zip(damages, newest, strict=False)]
    code, printed = launcher.run(launcher.argv(workdir))
    assert code == 0, printed
    for checkpoint, file in zip(newest, damaged, strict=False):
        line = next(line for line in printed.splitlines() if f"checkpoint {checkpoint} is damaged" in line)
        assert file.relative_to(checkpoint).as_posix() in line
        assert f"checkpoint {checkpoint} was set aside as {checkpoint.name}.damaged-1" in printed
    assert f"resuming at step {int(newest[2].name.removeprefix('step_'))} of {STEPS}" in printed
    assert_same_run(workdir, unbroken)


def test_no_valid_checkpoint_left_is_an_error_that_changes_nothing(launcher, unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    for damage, checkpoint in zip((truncate, flip_a_bit, remove_the_marker), checkpoints_of(workdir), strict=True):
        damage(checkpoint)
    before = contents(workdir)
    assert run_main(train.main, launcher.argv(workdir)) == 2
    printed = capsys.readouterr().err
    assert f"error: no valid checkpoint is left in {workdir / 'checkpoints'}" in printed
    assert all(f"{checkpoint.name}: " in printed for checkpoint in checkpoints_of(workdir))
    assert "put a good copy back" in printed and "Traceback" not in printed
    assert contents(workdir) == before
