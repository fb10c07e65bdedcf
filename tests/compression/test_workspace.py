"""Work that is killed at every moment that there is, and gone on with."""

import numpy as np
import pytest

from jaxsvd.compression.workspace import Workspace
from jaxsvd.errors import UsageError

SETTINGS = {"base": "a", "method": "kfac"}


class Killed(Exception):
    pass


def walk(folder, done=lambda i: None):
    """Five steps whose results depend on all the steps before."""

    def step(i, carry):
        done(i)
        after = carry["x"] * 3 + i
        return {"x": after}, {"y": after + 0.5}

    work = Workspace(folder, SETTINGS, resume=True)
    last = work.sequence("walk", range(5), lambda: {"x": np.ones(2)}, step, lambda n: None)
    return last["x"], [work.load(f"walk/{i}")["y"] for i in range(5)]


def test_a_walk_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    want = walk(tmp_path / "whole")
    save = Workspace.save
    for moment in range(10):  # before and after each of the ten saves
        for after in (False, True):
            folder, saves, steps = tmp_path / f"{moment}-{after}", [], []

            def dying(self, name, arrays, saves=saves, moment=moment, after=after):
                saves.append(name)
                if after:
                    save(self, name, arrays)
                if len(saves) > moment:
                    raise Killed
                if not after:
                    save(self, name, arrays)

            monkeypatch.setattr(Workspace, "save", dying)
            with pytest.raises(Killed):
                walk(folder)
            monkeypatch.setattr(Workspace, "save", save)
            found = walk(folder, steps.append)
            np.testing.assert_array_equal(found[0], want[0])
            np.testing.assert_array_equal(found[1], want[1])
            assert len(steps) <= 5 - moment // 2, "what was done is not done again"


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    work = Workspace(tmp_path / "work", SETTINGS, resume=False)
    work.save("a", {"x": np.zeros(3)})

    def dying(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", dying)
        with pytest.raises(Killed):
            work.save("a", {"x": np.ones(3)})
    assert work.load("a")["x"].sum() == 0


def test_other_settings_are_refused_and_named(tmp_path):
    Workspace(tmp_path / "work", SETTINGS, resume=False)
    with pytest.raises(UsageError, match="another method"):
        Workspace(tmp_path / "work", SETTINGS | {"method": "svd"}, resume=True)


def test_without_resuming_it_starts_again(tmp_path):
    Workspace(tmp_path / "work", SETTINGS, resume=False).save("a", {"x": np.zeros(1)})
    assert not Workspace(tmp_path / "work", SETTINGS | {"method": "svd"}, resume=False).has("a")


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="other files"):
        Workspace(tmp_path, SETTINGS, resume=False)
    assert (tmp_path / "letter.txt").read_text() == "dear"
