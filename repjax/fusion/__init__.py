"""Fuse: re-parameterization for any JAX function, without layers of this package.

  fused = repjax.fuse(function, params, images)   # function(params, *args); arrays or shapes
  small = fused.fold(params)                      # {"params/stem/conv/kernel": array, ...}
  logits = fused(small, images)                   # equals function(params, images)
  print(fused.report)

The function is traced into a flat program (`repjax.program`). Values that depend on parameters
alone become expressions, which the fold evaluates. Values that depend on the arguments become sums
of convolutions over earlier values, as long as the arithmetic is affine. They are computed where an
operation needs them that is not affine, with the fewest convolutions. If nothing merges, the
original equation stays.

  y = relu(norm(conv3x3(x)) + norm(conv1x1(x)) + x)    becomes    y = relu(conv3x3(x) + bias)

Files, in the order in which a function passes them:
  modules       what is no function, and what are no parameters
  fused         traces, plans each shape once, checks, folds and calls
  planning      visits equations in order, decides what is computed and where
  expressions   what depends on parameters alone, to be evaluated by the fold
  values, windows    sums of terms; how a term reads its source along each axis
  arithmetic, pixels, layouts, products    rules: which equations are affine, by kind
  bodies        loops and choices, whose programs are fused like functions
  choice        which steps are put into which, and which terms become one product
  composition, kernels    puts one step into the next; the algebra of their kernels
  merges        sums as instructions, and how they run
  plan          instructions and stored arrays: what runs
  checks        plans against the original equations, and against plans of different shapes
  report        what was merged, what was left alone and why, and what products cost
  saving        folders of folded parameters
"""

from collections.abc import Callable, Sequence
from typing import Any

from repjax.errors import InputError, printable
from repjax.fusion.checks import INFERENCE_MODE
from repjax.fusion.fused import Fused
from repjax.fusion.modules import check_callable, check_params
from repjax.program import place_of

__all__ = ["Fused", "fuse"]


def fuse(
  function: Callable[..., Any],
  params: Any,
  *args: Any,
  growth: float = 1.0,
  check: bool = True,
  strict: bool = False,
  also: Sequence[Any] = (),
) -> Fused:
  """Merges the convolutions, norms and branches of any JAX function in inference mode.

  The result computes the same function for any parameters and arguments, to rounding. What would
  not be exact is left alone, and the report says why. Nothing is computed here besides the check.

  Args:
    function: takes a tree of parameters and the arguments; JAX must be able to trace it.
    params: the tree of parameters, as arrays or as shapes and dtypes.
    *args: arguments, as arrays or as shapes and dtypes. Other shapes work too, and are planned at
      their first call.
    growth: largest factor by which a merge may raise multiplications or weights. 1 allows no more
      of either than before. Biases and border maps are not counted.
    check: compare each merge with the equations that it replaces, once, on random numbers.
    strict: raise if a norm stays: a scale and a shift of each channel, both from parameters, as of
      a batch norm. Statistics that follow from the input, as of a layer norm, are not counted. Also
      raise if the function is in training mode.
    also: further arguments, one or a tuple for each call. Only what holds for all is merged.

  Returns:
    The function in two parts, with `fold`, a call and a `report`.

  Raises:
    InputError: the function is a module, the parameters are not a tree of arrays, the function
      cannot be traced, a norm stays although `strict` is set, no plan holds for all shapes, or the
      check finds a mistake.

  Example:
    fused = repjax.fuse(model.apply, variables, images)
    logits = jax.jit(fused)(fused.fold(variables), images)

  References:
    Ding et al., RepVGG, CVPR 2021, section 3.3. https://arxiv.org/abs/2101.03697
    Ding et al., Diverse Branch Block, CVPR 2021, section 3. https://arxiv.org/abs/2103.13425
  """
  check_callable(function, "a function(params, *args)")
  check_params(params, or_shapes=True)
  if not isinstance(also, list | tuple):
    raise InputError(
      f"also is {printable(repr(also), 80)}, but must be a list of arguments, or of tuples of "
      "arguments for functions of several. Write also=[images]"
    )
  calls = [args, *(each if isinstance(each, tuple) else (each,) for each in also)]
  fused = Fused(function, params, calls, growth=growth, check=check)
  norms = fused.report.norms
  if strict and fused.report.training:
    raise InputError(
      f"strict=True wants a function without norms, and this one {fused.report.training}. Pass "
      f"{INFERENCE_MODE}. Or leave strict out"
    )
  if strict and norms:
    first = place_of(norms[0].scope) if norms[0].scope else norms[0].place or place_of("")
    stay = "1 norm stays" if len(norms) == 1 else f"{len(norms):,} norms stay"
    raise InputError(
      f"{stay} in the fused function. The first, {first}, {norms[0].reason}. "
      "Leave strict=True out to accept that"
    )
  return fused
