"""Checkpoints come back to the byte, or say which file is at fault; under any number of devices."""

import json
import logging
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.devices import first
from tests.training.tiny import make_batch, setup
from zoo.errors import UserError
from zoo.training import checkpoints, manifest, sharding
from zoo.training.checkpoints import Checkpoints, SaveFailed, restore_numpy


def small_state(scale=1.0, mesh=None):
    mesh = mesh or sharding.make_mesh(devices=first(1))
    tree = {
        "params": {"stage_0": {"kernel": scale * np.arange(64, dtype=np.float32).reshape(2, 4, 8)}},
        "opt_state": (np.float32(scale), {"mu": scale * np.ones(8, np.float32)}),
        "step": np.int32(scale),
    }
    return jax.device_put(tree, sharding.replicated(mesh))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, of the steps 10 and 20; tests work on copies."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    store = Checkpoints(directory)
    for step in (10, 20):
        store.save(step, small_state(step), {"tokens": step * 100})
    store.close()
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_restore_gives_back_the_newest(copy):
    restored = Checkpoints(copy).restore(abstract(small_state()))
    assert (restored.step, restored.extra) == (20, {"tokens": 2000})
    chex.assert_trees_all_equal(restored.state, small_state(20))
    assert isinstance(restored.state["opt_state"], tuple)


def test_nothing_there_is_none(tmp_path):
    assert Checkpoints(tmp_path / "absent").restore(abstract(small_state())) is None


def files_of(directory):
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def kinds(directory):
    """One file of each kind: data, its index, metadata, and our marker."""
    names = files_of(directory)
    data = max((n for n in names if "/d/" in n), key=lambda n: (directory / n).stat().st_size)
    return {"data": data, "index": "manifest.ocdbt", "metadata": "_METADATA", "marker": manifest.FILE_NAME}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def delete(path):
    path.unlink()


@pytest.mark.parametrize("harm", [truncate, flip, delete])
@pytest.mark.parametrize("kind", ["data", "index", "metadata", "marker"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(copy, caplog, harm, kind):
    newest = copy / "step_00000020"
    name = kinds(newest)[kind]
    harm(newest / name)
    with caplog.at_level(logging.WARNING):
        store = Checkpoints(copy)
        restored = store.restore(abstract(small_state()))
    assert restored.step == 10
    chex.assert_trees_all_equal(restored.state, small_state(10))
    assert "step_00000020 is damaged" in caplog.text and name in caplog.text
    assert not newest.exists() and (copy / "step_00000020.damaged-1").is_dir()
    store.save(20, small_state(21), {})  # the step can be written again
    store.close()
    assert restore_numpy(copy).state["step"] == 21


def test_every_bit_matters(saved, tmp_path):
    """One flipped bit in any file, at a random place, is found."""
    rng = np.random.default_rng(0)
    original = saved / "step_00000020"
    for name in files_of(original):
        bad = shutil.copytree(original, tmp_path / "bad")
        data = bytearray((bad / name).read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (bad / name).write_bytes(bytes(data))
        with pytest.raises(manifest.Damaged):
            manifest.verify(bad)
        shutil.rmtree(bad)


def test_none_left_is_an_error_that_lists_all(copy):
    truncate(copy / "step_00000010" / "_METADATA")
    delete(copy / "step_00000020" / manifest.FILE_NAME)
    message = (
        r"no valid checkpoint is left .*step_00000020: checkpoint.json .*missing; step_00000010: file _METADATA is"
    )
    for _ in range(2):  # nothing was renamed: the second start does not begin from scratch either
        with pytest.raises(UserError, match=message):
            Checkpoints(copy).restore(abstract(small_state()))


def test_set_aside_checkpoints_still_count_as_existing(copy):
    truncate(copy / "step_00000020" / "_METADATA")
    Checkpoints(copy).restore(abstract(small_state()))
    shutil.rmtree(copy / "step_00000010")
    with pytest.raises(UserError, match=r"step_00000020\.damaged-1: set aside earlier"):
        Checkpoints(copy).restore(abstract(small_state()))


def test_what_a_kill_left_is_removed(copy):
    for name in (".saving-step_00000030", ".saving-step_00000030.orbax-checkpoint-tmp-7", ".deleting-step_00000005"):
        shutil.copytree(copy / "step_00000010", copy / name)
    store = Checkpoints(copy)
    assert store.restore(abstract(small_state())).step == 20
    assert sorted(p.name for p in copy.iterdir()) == ["step_00000010", "step_00000020"]
    store.save(30, small_state(30), {})
    store.close()
    assert checkpoints.steps_in(copy) == [30, 20, 10]


def test_only_an_unfinished_save_means_none(copy):
    shutil.rmtree(copy / "step_00000010")
    (copy / "step_00000020").rename(copy / ".saving-step_00000020")
    assert Checkpoints(copy).restore(abstract(small_state())) is None
    assert list(copy.iterdir()) == []


def test_the_newest_stay(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in range(1, 5):
        store.save(step, small_state(step), {})
    store.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_newer_format_is_refused(copy):
    path = copy / "step_00000020" / manifest.FILE_NAME
    body = json.loads(path.read_text())["body"] | {"format_version": 2}
    digest = manifest.hashlib.sha256(manifest._canonical(body)).hexdigest()
    path.write_text(json.dumps({"body": body, "sha256": digest}))
    with pytest.raises(UserError, match=r"format version 2; this version reads up to 1"):
        Checkpoints(copy).restore(abstract(small_state()))


def test_another_model_is_refused_with_all_differences(copy):
    state = small_state()
    state["params"]["stage_0"] = {"kernel": jnp.zeros((2, 4, 9)), "bias": jnp.zeros(3)}
    del state["step"]
    with pytest.raises(UserError) as error:
        Checkpoints(copy).restore(abstract(state))
    for part in (
        "params/stage_0/bias is not in the checkpoint",
        "step is not in the state",
        "kernel is float32[2, 4, 8] in the checkpoint, float32[2, 4, 9] here",
    ):
        assert part in str(error.value)


def test_numpy_reads_without_a_mesh(copy):
    restored = restore_numpy(copy, step=10)
    assert (restored.step, restored.extra) == (10, {"tokens": 1000})
    chex.assert_trees_all_equal(restored.state["params"], jax.device_get(small_state(10)["params"]))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(restored.state))
    assert list(restore_numpy(copy, part="params").state) == ["params"]
    with pytest.raises(UserError, match=r"no checkpoint of step 15 .* there are: 20, 10"):
        restore_numpy(copy, step=15)
    with pytest.raises(UserError, match="no part 'weights'; it has opt_state, params, step"):
        restore_numpy(copy, part="weights")
    truncate(copy / "step_00000010" / "_METADATA")
    with pytest.raises(UserError, match="damaged: file _METADATA"):
        restore_numpy(copy, step=10)


def test_a_failed_save_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    store = Checkpoints(tmp_path)
    store.save(1, small_state(1), {})
    store.wait()
    monkeypatch.setattr(checkpoints, "write_manifest", full)
    store.save(2, small_state(2), {})
    with pytest.raises(SaveFailed, match=r"step 2 .*No space left"):
        store.save(3, small_state(3), {})
    monkeypatch.undo()
    store.save(3, small_state(3), {})
    store.close()
    assert checkpoints.steps_in(tmp_path) == [3, 1]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    store = Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(SaveFailed, match="step 1"):
        store.save(1, small_state(), {})
        store.wait()


def test_saving_twice_is_a_mistake(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(1, small_state(), {})
    with pytest.raises(ValueError, match="step 1 already"):
        store.save(1, small_state(), {})


def test_one_eight_two_devices_and_donation(tmp_path):
    """Saved under one mesh, restored under another, and the donated steps that follow a save do not reach into it."""
    one, eight = setup(dropout=True), setup(sharding.make_mesh(2, 2, 2, devices=first(8)), dropout=True)
    two = setup(sharding.make_mesh(1, 2, devices=first(2)), dropout=True)
    store, state, expected = Checkpoints(tmp_path), one.fresh(), None
    for number, tiny in enumerate((one, eight, two)):
        if expected is not None:
            restored = store.restore(sharding.with_shardings(expected, tiny.shardings))
            chex.assert_trees_all_equal(jax.device_get(restored.state), expected)
            assert restored.step == number
            state = restored.state
            assert jax.tree.map(lambda x: x.sharding, state) == tiny.shardings
        state, _ = tiny.train_step(state, tiny.put(make_batch(number)))
        expected = jax.tree.map(np.array, jax.device_get(state))
        store.save(number + 1, state, {})
        for i in range(3):
            state, _ = tiny.train_step(state, tiny.put(make_batch(i)))
    store.close()
    chex.assert_trees_all_equal(restore_numpy(tmp_path, part="params").state["params"], expected.params)
