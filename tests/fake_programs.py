"""Fake programs of Slurm's, for tests on machines without one."""

import stat

import pytest


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """PATH with nothing but the fake programs that a test makes: ``programs("squeue", text)``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def make(name, text):
        path = folder / name
        path.write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\nhere={tmp_path}\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make
