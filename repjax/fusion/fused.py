"""`Fused`, what `repjax.fuse` returns: a function in two parts."""

import copy
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from repjax.errors import InputError, listed, printable
from repjax.fusion.checks import (
  INFERENCE_MODE,
  check,
  differing,
  kept_apart,
  reason_of_training,
)
from repjax.fusion.expressions import Expressions
from repjax.fusion.modules import check_params, is_array, shown, traced
from repjax.fusion.plan import Plan
from repjax.fusion.planning import Planner, equations_of
from repjax.fusion.report import Report
from repjax.fusion.saving import load, save
from repjax.program import Equation, Program
from repjax.trees import leaf_name


class Fused:
  """A function in two parts: `fold`, which runs once, and a call, which runs for each input.

  Made by `repjax.fuse`. Each new shape of arguments is planned at its first call, and must fold
  the same parameters as the shapes that `fuse` was called with. Threads may share it.

  Attributes:
    report: what was merged and what was not, for the arguments that `fuse` was called with.
  """

  def __init__(
    self,
    function: Callable[..., Any],
    params: Any,
    calls: Sequence[tuple[Any, ...]],
    *,
    growth: float,
    check: bool,
  ):
    if not isinstance(growth, int | float) or not growth >= 1:
      raise InputError(
        f"growth is {growth!r}, but must be 1 or more: the largest factor by which a merge may "
        "raise multiplications or weights. Leave it out to allow no more of either"
      )
    self._function, self._growth, self._check = function, growth, check
    paths, self._tree = jax.tree_util.tree_flatten_with_path(params)
    self._paths = [leaf_name(path) for path, _ in paths]
    self._avals = [_aval(leaf, f"the parameter {leaf_name(path)}") for path, leaf in paths]
    self._table = Expressions()
    self._plans: dict[Any, Plan] = {}
    # Threads of a server may meet new shapes at once, and all plans share one table.
    self._planning = threading.RLock()
    self._first, self.report = self._planned_together(calls)
    self._fold = jax.jit(self._first.fold)

  def __repr__(self) -> str:
    before, after = self.report.before, self.report.after
    return (
      f"Fused({before.products:,} -> {after.products:,} products, "
      f"{before.parameters:,} -> {after.parameters:,} parameters, "
      f"{len(self.report.norms):,} norms left)"
    )

  def fold(self, params: Any) -> dict[str, jax.Array]:
    """Returns the parameters of the fused function.

    A pure function, which `jax.jit`, `jax.vmap` and `jax.grad` take. Kernels are computed in
    float32 or wider, and rounded once to the dtype of the program.

    Args:
      params: a tree of arrays with the names of the one that `fuse` was called with. Its
        dictionaries may be of a different class or order.

    Returns:
      Arrays by name. A kernel has the name of the largest parameter that became part of it.

    Raises:
      InputError: names, shapes or dtypes differ from those of `fuse`.
    """
    check_params(params)
    leaves = self._leaves(params)
    for path, leaf, aval in zip(self._paths, leaves, self._avals):
      shape, dtype = _form(leaf)
      if (shape, dtype) != (aval.shape, aval.dtype):
        raise InputError(
          f"fold got {path} with shape {shape} and dtype {dtype}, but fuse was called with "
          f"{aval.shape} and {aval.dtype}. Pass parameters of the same model"
        )
    return self._fold(leaves)

  def __call__(self, folded: Mapping[str, Any], *args: Any) -> Any:
    """Returns what the function returns for the parameters that were folded.

    Args:
      folded: what `fold` returned.
      *args: the arguments of the function after its parameters.

    Raises:
      InputError: the arrays are not those of `fold`, arguments of these shapes need different
        fused parameters, or a size is a symbol of `jax.export` and checks are on.
    """
    plan = self._planned(args)
    _check_folded(folded, self._first)
    results = plan.call(folded, [jnp.asarray(leaf) for leaf in jax.tree.leaves(args)])
    return jax.tree.unflatten(jax.tree.structure(plan.program.results), results)

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of what `fold` returns, by name."""
    stored = self._first.stored.items()
    return {name: jax.ShapeDtypeStruct(each.shape, each.dtype) for name, each in stored}

  @property
  def arguments(self) -> list[jax.ShapeDtypeStruct]:
    """The shapes and dtypes of the arrays after the parameters that `fuse` was called with."""
    avals = [variable.aval for variable in self._first.arguments]
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]

  @property
  def original(self) -> tuple[Callable[..., Any], Any]:
    """The function that `fuse` was called with, and its parameters as shapes and dtypes."""
    return self._function, self._tree.unflatten(self._avals)

  def without_checks(self) -> "Fused":
    """Returns the same fused function, which does not check its plans for further shapes.

    For batches of further sizes: their plans differ from a checked plan in the number of rows
    alone. A batch size may then also be a symbol of `jax.export`.
    """
    other = copy.copy(self)
    other._check = False
    return other

  def save(self, folded: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
    """Writes folded parameters into a folder, with a checksum for each file.

    A process that has the function, but not its parameters, goes on from there:
    `repjax.fuse(function, shapes, images)` and `load`. The folder is replaced as a whole.

    Args:
      folded: what `fold` returned.
      folder: the folder to make, or one of an earlier call for the same function.

    Raises:
      InputError: the arrays are not those of `fold`, or the folder cannot be written or holds
        something else.
    """
    _check_folded(folded, self._first)
    save(folded, folder)

  def load(self, folder: str | os.PathLike[str], *, verify: bool = True) -> dict[str, jax.Array]:
    """Reads folded parameters that `save` wrote.

    They are known by their names, shapes and dtypes. Functions that differ in nothing else, such as
    in an activation, cannot be told apart.

    Args:
      folder: the folder.
      verify: compare every file with its checksum, and refuse numbers that are not finite.

    Returns:
      The arrays that `fold` returned.

    Raises:
      InputError: the folder is missing or damaged, or holds the parameters of a different function.
    """
    return load(self.shapes, folder, verify=verify)

  def _leaves(self, params: Any) -> list[Any]:
    """Returns the leaves of a parameter tree in the order of the tree that was planned.

    Containers may differ, such as a FrozenDict in place of a dict. Names must not.
    """
    leaves, tree = jax.tree.flatten(params)
    if tree == self._tree:
      return leaves
    held = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    lost = [path for path in self._paths if path not in held]
    unknown = [path for path in held if path not in self._paths]
    if lost or unknown or not len(leaves) == len(held) == len(self._paths):
      sides = {"lacks": lost, "has in addition": unknown}
      said = "; ".join(f"{side} {listed(names, 3)}" for side, names in sides.items() if names)
      raise InputError(
        f"fold got {len(leaves)} parameters with different names than the {len(self._paths)} that "
        f"fuse was called with: the tree {said or 'repeats a name'}. Pass parameters of the same "
        "model, in the tree that fuse saw"
      )
    return [held[path] for path in self._paths]

  def _planned(self, args: tuple[Any, ...]) -> Plan:
    """Returns the plan for arguments, and makes it if there is none."""
    key = _key(args)
    if key not in self._plans:
      with self._planning:
        if key not in self._plans:
          self._plans[key] = self._planned_alone(args)
    return self._plans[key]

  def _planned_alone(self, args: tuple[Any, ...]) -> Plan:
    """Plans a call that must fold the same parameters as the first."""
    ((plan, equations, _),), names = self._agreeing([args], self._first)
    if names:
      raise InputError(
        "arguments of these shapes and dtypes need different fused parameters than those that fuse "
        f"was called with: {listed(names, 3)}. Convolutions with SAME padding and stride 2, for "
        "example, depend on whether sizes are even, and a parameter that is resized to the input "
        "depends on the size. Call fuse for these shapes, or pass them in `also`, which merges "
        "only what holds for all"
      )
    self._checked(args, plan, equations)
    return plan

  def _planned_together(self, calls: Sequence[tuple[Any, ...]]) -> tuple[Plan, Report]:
    """Plans several calls so that all of them fold the same parameters."""
    made, names = self._agreeing(calls)
    if names:
      raise InputError(
        "no plan holds for all shapes in `also`: the parameters "
        f"{listed(sorted(names), 3)} are read in different ways. Call fuse for each shape"
      )
    for args, (plan, equations, _) in zip(calls, made):
      self._checked(args, plan, equations)
      self._plans[_key(args)] = plan
    return made[0][0], made[0][2]

  def _checked(self, args: tuple[Any, ...], plan: Plan, equations: Sequence[Equation]) -> None:
    """Compares the merges of a plan with the function, if checks are wanted."""
    if self._check:
      # Products are compared at full precision, which a GPU or TPU does not have by default.
      with jax.default_matmul_precision("highest"):
        exact = equations_of(self._traced(args))
      check(plan, equations, exact)

  def _agreeing(self, calls: Sequence[tuple[Any, ...]], wanted: Plan | None = None):
    """Plans calls, and keeps apart what would fold parameters in different ways.

    Args:
      calls: arguments of each.
      wanted: the plan to agree with, None for that of the first call.

    Returns:
      For each call the plan, its equations and the report; and the names of the parameters that
      differ nevertheless.
    """
    apart: list[frozenset[int]] = [frozenset() for _ in calls]
    found: list[str] = []
    while True:
      made = [self._plan(args, own) for args, own in zip(calls, apart)]
      first = wanted or made[0][0]
      differ = [differing(first, plan, self._avals) for plan, *_ in made]
      names = list(dict.fromkeys(name for each in differ for name in each))
      found = found or names
      more = [own | kept_apart(plan, steps, names) for own, (plan, steps, _) in zip(apart, made)]
      if not names or more == apart:
        return made, names and found
      apart = more

  def _plan(self, args: tuple[Any, ...], apart: frozenset[int]):
    """Returns a plan for arguments, the equations of the traced program, and the report."""
    program = self._traced(args)
    planner = Planner(program, self._table, self._growth, apart)
    count = len(self._avals)
    plan = planner.planned(range(count), dict(enumerate(self._paths)))
    reason = reason_of_training(planner.equations, plan.arguments)
    planner.report.training = reason
    if reason:
      warnings.warn(
        f"the function passed to fuse {reason}. Nothing merges across that. Pass {INFERENCE_MODE}",
        stacklevel=_caller_level(),
      )
    return plan, planner.equations, planner.report

  def _traced(self, args: tuple[Any, ...]) -> Program:
    avals, tree = _forms(args)
    return traced("fuse", self._function, self._tree.unflatten(self._avals), *tree.unflatten(avals))


def _check_folded(folded: Any, plan: Plan) -> None:
  """Checks that arrays are those of a plan's fold.

  Raises:
    InputError: names, shapes or dtypes differ.
  """
  names = set(folded) if isinstance(folded, Mapping) else set()
  odd = [
    name
    for name, expression in plan.stored.items()
    if name not in names or _form(folded[name]) != (expression.shape, expression.dtype)
  ]
  odd += sorted(names - set(plan.stored))
  if odd:
    raise InputError(
      "a fused function got parameters that are not from its own fold. Missing, unknown or of a "
      f"different shape or dtype: {listed(odd, 3)}. Pass what its `fold` returned"
    )


def _form(leaf: Any) -> tuple[Any, Any]:
  """Returns shape and dtype of an array, None for what is none."""
  if not is_array(leaf):
    return None, None
  if not hasattr(leaf, "dtype"):
    return jnp.shape(leaf), jnp.result_type(leaf)
  # A weakly typed array keeps its own dtype, also where a number of Python would have 64 bits.
  return leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)


_MODES = ("jax_enable_x64", "jax_default_matmul_precision")
"""The settings of JAX that programs of the same shapes depend on."""


def _key(args: Any) -> Any:
  """Returns all that the program of a call depends on besides the function and its parameters."""
  avals, tree = _forms(args)
  modes = tuple(getattr(jax.config, name) for name in _MODES)
  return tree, tuple((aval.shape, aval.dtype, aval.weak_type) for aval in avals), modes


def _forms(args: Any) -> tuple[list[jax.ShapeDtypeStruct], Any]:
  """Returns shapes and dtypes of all arguments, and the structure of their tree."""
  leaves, tree = jax.tree.flatten(args)
  return [_aval(leaf, f"argument {place}") for place, leaf in enumerate(leaves)], tree


def _aval(leaf: Any, what: str) -> jax.ShapeDtypeStruct:
  """Returns shape and dtype of an array. A number of Python takes the dtype of its neighbours.

  Raises:
    InputError: it is no array.
  """
  if is_array(leaf):
    aval = jax.eval_shape(jnp.asarray, leaf)
    # Programs do not say how a call that is inside `jax.shard_map` spreads its arrays over devices.
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
  raise InputError(
    f"fuse takes trees of arrays, or of shapes and dtypes, but {printable(what)} is "
    f"{shown(leaf)}. Pass settings by functools.partial instead"
  )


def _caller_level() -> int:
  """Returns the number of calls between a warning and the code that called this package."""
  import inspect

  frame, level = inspect.currentframe(), 0
  while frame is not None and "repjax" in frame.f_globals.get("__name__", "").split(".")[:1]:
    frame, level = frame.f_back, level + 1
  return level
