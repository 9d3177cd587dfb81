"""Runs of one config in one process share their steps, which are traced and compiled once."""

import contextlib
import importlib
from unittest import mock

import ml_collections
from flax import linen as nn

from repjax.spec import ModelSpec, Preprocessing
from repjax.training.settings import Plan

MAKERS = {
  "recipe": ("make_schedule", "make_optimizer"),
  "fitting": ("make_train_step", "make_eval_step"),
  "evaluation": ("make_eval_step",),
  "recalibration": ("_make_statistics_step", "make_eval_step"),
  "conversion": ("_make_compare_step",),
}
# What a run does beside its steps.
BESIDE = ("data_dir", "num_workers", "save_every_minutes", "tensorboard")

_made = {}  # of a maker and its arguments
_compiled = {}  # of a step that was made, and of whether its state is donated


@contextlib.contextmanager
def shared():
  """Makes a step once for all equal arguments of its maker, and its compiled function once.

  All arguments count, so that a step which comes to depend on more is another one. Steps that a
  test makes by itself stay its own, and programs in other processes begin with nothing.
  """
  with contextlib.ExitStack() as patches:
    for name, makers in MAKERS.items():
      module = importlib.import_module(f"repjax.training.{name}")
      for maker in makers:
        _replace(patches, module, maker, _made_once)
    parallel = importlib.import_module("repjax.training.parallel")
    _replace(patches, parallel, "data_parallel", _compiled_once)
    yield


def _replace(patches, module, name, once):
  """Puts a function that does its work once in the place of one, unless it is there already."""
  own = getattr(module, name)
  if not hasattr(own, "shares"):
    replaced = once(own)
    replaced.shares = True
    patches.enter_context(mock.patch.object(module, name, replaced))


def _made_once(make):
  def made(*arguments, **settings):
    told = (make, *map(_told, arguments), *((name, _told(settings[name])) for name in settings))
    try:
      hash(told)
    except TypeError:  # what cannot be told from others is made anew
      return make(*arguments, **settings)
    if told not in _made:
      _made[told] = make(*arguments, **settings)
      _compiled[_made[told]] = {}
    return _made[told]

  return made


def _compiled_once(data_parallel):
  def compiled(step, donate=False):
    held = _compiled.get(step, {})  # a step of somebody else's is compiled anew
    if donate not in held:
      held[donate] = data_parallel(step, donate)
    return held[donate]

  return compiled


def _told(argument):
  """What tells an argument from others: of functions which one it is, of all else the values."""
  if isinstance(argument, ml_collections.ConfigDict):
    return repr({name: argument[name] for name in argument if name not in BESIDE})
  if isinstance(argument, Plan):
    return repr(argument._replace(train=None, eval=None))
  if isinstance(argument, (nn.Module, ModelSpec, Preprocessing)):
    return type(argument), repr(argument)
  return argument
