"""Runs convolutions and products in float64 on maps with no memory around them.

XLA's code for CPUs read in front of a padded map of one channel in jax 0.10.2. With unmapped pages
on both sides of the map, this ends the process at once. In pure JAX, with `guarded` as below:

  x = guarded(np.ones((1, 64, 64, 1)))
  jax.lax.conv_general_dilated(
    x, jnp.ones((3, 3, 1, 1)), (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
"""

import ctypes
import mmap

import jax
import numpy as np

from repjax.layers import RepConv, RepDense
from tests.helpers import F64, random_variables

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_HELD = []  # Memory must not be unmapped while JAX may read it.


def guarded(array):
  """Returns an array in place between two pages that no one may read."""
  page = mmap.PAGESIZE
  assert not array.nbytes % page
  memory = mmap.mmap(-1, array.nbytes + 2 * page)
  base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
  for start in (base, base + page + array.nbytes):
    assert not _LIBC.mprotect(start, page, 0)
  inside = np.frombuffer(memory, array.dtype, array.size, page).reshape(array.shape)
  inside[...] = array
  _HELD.append(memory)
  made = jax.dlpack.from_dlpack(inside, copy=False)
  assert made.unsafe_buffer_pointer() == base + page
  return made


def main():
  jax.config.update("jax_enable_x64", True)
  for layer in (
    RepConv(1, branches=("conv3x3", "conv1x1"), **F64),
    RepConv(1, branches=("conv3x3", "conv1x1"), deploy=True, **F64),
    RepDense(16, tile=8, groups=4, local_kernels=(1, 3), **F64),  # its gradient crashed too
  ):
    shape = (2, 64, 64, 16 if isinstance(layer, RepDense) else 1)
    x = np.random.default_rng(0).normal(size=shape)
    variables = random_variables(layer, x)

    def loss(x, layer=layer, variables=variables):
      return (layer.apply(variables, x) ** 2).sum()

    y = layer.apply(variables, guarded(x))  # op by op
    _, pull = jax.vjp(lambda x, layer=layer, v=variables: layer.apply(v, x), guarded(x))
    jax.block_until_ready((y, pull(guarded(np.asarray(y))), jax.jit(jax.grad(loss))(guarded(x))))
  print("survived", flush=True)


if __name__ == "__main__":
  main()
