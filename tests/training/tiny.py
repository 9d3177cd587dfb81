"""The one small run that many tests share: a narrow RepVGG on the handwritten digits."""

import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

import repjax
from repjax.configs import digits
from repjax.spec import Preprocessing
from repjax.training import optimizer, parallel
from repjax.training.state import create_state
from repjax.training.step import make_train_step
from repjax.training.tasks import Classification
from tests.helpers import leaves, random_variables

ROOT = Path(__file__).parents[2]
STEPS, EVAL_STEPS = 12, 4
OVERRIDES = {
  "stage_sizes": (1, 1, 1, 1),
  "width_multipliers": (0.125,) * 4,
  "strides": (1, 1, 2, 2, 2),
}


WITH_GATES_AND_HEADS = {
  **OVERRIDES,
  "stage_sizes": (1, 1, 2, 1),
  "se": "post",
  "se_reduction": 4,
  "aux_heads": True,
}


def config(data_dir, **changes):
  """Returns a config of 12 steps with an evaluation every 4, and with `changes` to its fields."""
  result = digits.get_config()
  result.model_overrides.update(OVERRIDES)
  result.data_dir = str(data_dir)
  result.batch_size = 32
  result.num_steps = STEPS
  result.eval_every_epochs = EVAL_STEPS * 32 / 1437
  result.warmup_epochs = 3 * 32 / 1437
  result.log_every_steps = 3
  result.model_overrides.update(changes.pop("model_overrides", {}))
  result.update(changes)
  return result


def averaging(data_dir, **changes):
  """Returns the config of a run that also averages its variables."""
  return config(data_dir, ema_decay=0.8, **changes)


def segmentation(**changes):
  """Returns the config of a run of 12 steps that segments noise, with `changes` to its fields."""
  result = digits.get_config()
  overrides = dict.fromkeys(result.model_overrides)
  backbone = {"backbone": "repvgg_a0", "backbone_overrides": {**OVERRIDES, "strides": (2,) * 5}}
  heads = {"head_features": 8, "aux_features": 8, "bins": (1, 2)}
  result.update({"task": "segmentation", "model": "pspnet", "num_classes": 3})
  result.model_overrides.update({**overrides, **backbone, **heads})
  result.update(
    {"dataset": "synthetic", "eval_split": "sample", "augment": "scale_and_crop | flip"}
  )
  result.update({"batch_size": 32, "num_steps": STEPS, "eval_every_epochs": EVAL_STEPS * 32 / 1024})
  result.update({"log_every_steps": 3, "warmup_epochs": 3 * 32 / 1024, "sync_batch_norm": True})
  result.update({"schedule": "poly", "backbone_rate": 0.1, "aux_weight": 0.4})
  result.update({"class_weights": (1.0, 2.0, 0.5), "eval_window": 12, "eval_flip": True})
  result.update(changes)
  return result


def one_step_with_everything(shard):
  """Returns metrics and sums of parameters after a step with dropout, mixing and shared statistics.

  Args:
    shard: (index, count) of the processes that take the step together, of four devices in all.
  """
  size, preprocessing = 16, Preprocessing(16, 16, "bilinear", (0.5,) * 3, (0.2,) * 3)
  model = repjax.create_model("repvgg_a0", num_classes=10, dropout=0.3, **OVERRIDES)
  sgd = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
  state = create_state(random_variables(model, np.ones((1, size, size, 3), np.float32)), sgd)
  model = model.clone(axis_name=parallel.AXIS)
  step = make_train_step(
    model,
    sgd,
    preprocessing,
    task=Classification(mixup=0.2, cutmix=1.0),
    seed=3,
    axis_name=parallel.AXIS,
  )
  rng, each = np.random.default_rng(0), 16 // shard[1]
  own = slice(shard[0] * each, (shard[0] + 1) * each)
  batch = {
    "image": rng.integers(0, 256, (16, size, size, 3), np.uint8)[own],
    "label": rng.integers(0, 10, 16, np.int32)[own],
  }
  state, metrics = parallel.data_parallel(step)(parallel.place(state), parallel.split(batch))
  sums = {path: np.abs(value).sum() for path, value in leaves(state.variables).items()}
  return {name: float(value) for name, value in {**metrics, **sums}.items()}


@contextlib.contextmanager
def quick_programs(cache):
  """Compiles fast rather than well, each program once a session, away from the user's cache."""
  changes = {
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": str(cache),
    "jax_persistent_cache_min_compile_time_secs": 0.3,
  }
  held = {name: jax.config.values[name] for name in changes}
  for name, value in changes.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in held.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@contextlib.contextmanager
def quick_collection():
  """Leaves what other tests hold, which is millions of objects, out of garbage collections."""
  gc.freeze()
  yield
  gc.unfreeze()


def contents(folder):
  """Returns the bytes of every file below a folder, by path."""
  paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def start_python(*arguments, cwd, cache):
  """Starts Python on this checkout in a process of its own."""
  environment = {
    "HOME": str(cwd),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_NUM_CPU_DEVICES": "4",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    "JAX_PLATFORMS": "cpu",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    "PATH": "/usr/bin:/bin",
    "PYTHONPATH": str(ROOT),
    "XDG_CACHE_HOME": str(cache),
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
  }
  return subprocess.Popen(
    [sys.executable, *arguments],
    cwd=cwd,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run_python(*arguments, cwd, cache):
  """Runs Python on this checkout in a process of its own, to its end."""
  process = start_python(*arguments, cwd=cwd, cache=cache)
  out, err = process.communicate()
  return subprocess.CompletedProcess(process.args, process.returncode, out, err)
