"""The folder of compiled programs."""

import jax
import pytest

from repjax import cache

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")


def test_programs_are_kept_in_the_users_cache_folder(monkeypatch, tmp_path):
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  cache.use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "repjax" / "xla")


def test_without_a_setting_the_cache_folder_is_in_the_home(monkeypatch, tmp_path):
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  cache.use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "repjax" / "xla")


def test_a_cache_folder_that_the_user_has_set_stays(monkeypatch, tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
  cache.use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_the_least_time_to_compile_is_set_for_a_while():
  held = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
  with cache.keep_every_program():
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0
  assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == held
