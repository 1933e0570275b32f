"""Where files go."""

import sys

from experiments.storage import paths


def test_cache_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert paths.cache_folder("attention") == tmp_path / "cache" / "attention"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    expected = {"linux": ".cache", "darwin": "Library/Caches", "win32": "Local"}
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    for platform, place in expected.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert paths.cache_folder("attention") == tmp_path / place / "attention"
