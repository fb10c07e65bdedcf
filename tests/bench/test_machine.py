"""Where a benchmark ran, for the record, and its memory's speed."""

import subprocess
from pathlib import Path

import jax
import pytest

from jaxsvd.bench import machine
from jaxsvd.errors import UsageError

ROOT = Path(__file__).parents[2]


def git(folder, *arguments):
    command = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_bandwidth_is_given_known_or_measured(monkeypatch):
    assert machine.bandwidth(123.0) == (123, "given")
    kind = jax.local_devices()[0].device_kind
    monkeypatch.setattr(machine, "_SECONDS", 0.0)
    measured = machine.bandwidth()
    assert measured.rate > 0 and "measured in this run" in measured.source
    assert machine._copy_rate() > 0  # what other devices than CPUs do
    monkeypatch.setitem(machine.COPY_RATES, kind, 7.0)
    assert machine.bandwidth().rate == 7 and "before" in machine.bandwidth().source
    assert machine.COPY_RATES["NVIDIA H200"] == 4300


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bandwidth_is_positive(rate):
    with pytest.raises(UsageError, match="above 0"):
        machine.bandwidth(rate)


def test_the_commit_of_a_checkout_only(tmp_path):
    assert machine.commit(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "1")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert machine.commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert machine.commit(tmp_path) == head + "+"
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert machine.commit(inside) is None  # that is the commit of something else


def test_git_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit() is None


def test_the_record_names_device_and_versions():
    found = machine.description()
    assert found["versions"]["jax"] == jax.__version__ and set(found["versions"]) >= {"flax", "jaxsvd", "python"}
    assert found["device"] == jax.local_devices()[0].device_kind and found["date"].startswith("20")
