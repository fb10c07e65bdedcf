"""Work that was interrupted, and gone on with: dry runs, other settings, kills."""

import itertools
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import jaxsvd
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.compression.workspace import Workspace
from jaxsvd.errors import UsageError

TOKENS = 1024


def test_a_dry_run_writes_no_model_and_is_gone_on_with(source, text, tmp_path, monkeypatch):
    options = {"calibration": [text], "tokens": TOKENS, "progress": False}
    planned = jaxsvd.compress(source, tmp_path / "t", 0.7, dry_run=True, **options)
    assert [path.name for path in tmp_path.iterdir()] == [".t.work"]
    with pytest.raises(UsageError, match="--resume"):
        jaxsvd.compress(source, tmp_path / "t", 0.7, **options)
    monkeypatch.setattr("jaxsvd.compression.passes.LayerPass.forward", None)  # the analysis must not run again
    report = jaxsvd.compress(source, tmp_path / "t", 0.7, resume=True, **options)
    assert report.plan == planned.plan and report.keep_bytes == planned.keep_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_resuming_with_other_settings_is_refused(source, text, tmp_path):
    options = {"calibration": [text], "progress": False}
    jaxsvd.compress(source, tmp_path / "t", tokens=TOKENS, dry_run=True, **options)
    for changed in ({"method": "asvd"}, {"tokens": 2 * TOKENS}, {"seed": 1, "tokens": TOKENS}, {"only": "mlp"}):
        with pytest.raises(UsageError, match="begun with another"):
            jaxsvd.compress(source, tmp_path / "t", resume=True, **{"tokens": TOKENS} | options | changed)


def test_killed_behind_the_last_step(source, text, tmp_path, monkeypatch):
    """The target is there and the work not yet removed: resuming only tidies up."""
    options = {"calibration": [text], "tokens": 512, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "remove", lambda self: None)
        jaxsvd.compress(source, tmp_path / "t", 0.7, **options)
    (tmp_path / ".t.abc.partial").mkdir()
    written = (tmp_path / "t" / "model.safetensors").stat()
    with pytest.raises(UsageError, match="exists"):  # another keep is another model
        jaxsvd.compress(source, tmp_path / "t", 0.6, resume=True, **options)
    jaxsvd.compress(source, tmp_path / "t", 0.7, resume=True, **options)
    assert (tmp_path / "t" / "model.safetensors").stat() == written
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


class Killed(Exception):
    pass


@pytest.mark.slow
def test_killed_again_and_again_and_resumed(source, text, tmp_path, monkeypatch):
    """Each run dies at its fifth save, until one is left to finish: its bytes are those of an undisturbed run.

    test_workspace.py dies at every save there is.
    """
    options = {"calibration": [text], "tokens": 512, "refit": True, "progress": False}
    want = jaxsvd.compress(source, tmp_path / "whole", 0.7, **options).target
    save, target, kills = Workspace.save, tmp_path / "t", 0
    saves = itertools.count(1)

    def dying(self, name, arrays):
        save(self, name, arrays)
        if next(saves) % 5 == 0:
            raise Killed

    while True:
        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "save", dying)
            try:
                jaxsvd.compress(source, target, 0.7, resume=True, **options)
                break
            except Killed:
                kills += 1
                assert not target.exists()
    assert kills >= 4 * 2 * 2 // 5  # walks × layers × (result, carry)
    for path in want.iterdir():
        assert path.read_bytes() == (target / path.name).read_bytes(), path.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "whole"]


@pytest.mark.slow
def test_killed_by_the_system_at_random_moments(source, text, tmp_path):
    """SIGKILL, twenty times, at moments spread over the run."""
    script = [sys.executable, "-m", "jaxsvd.cli", "compress", str(source)]
    options = ["--keep", "0.7", "--calibration", str(text), "--tokens", "2048", "--refit", "--width", "-q"]
    began = time.perf_counter()
    subprocess.run([*script, str(tmp_path / "whole"), *options], check=True)
    seconds, target = time.perf_counter() - began, tmp_path / "t"
    rng, kills = np.random.default_rng(0), 0
    while kills < 20:
        process = subprocess.Popen([*script, str(target), *options, "--resume"], stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.05, 1.1) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if target.exists():
            Checkpoint(target)  # whole, or not there
            if process.returncode == 0:
                shutil.rmtree(target)
    subprocess.run([*script, str(target), *options, "--resume"], check=True)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (target / path.name).read_bytes(), path.name
