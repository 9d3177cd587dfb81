"""Descriptions of GPUs, from public data sheets, by which XLA compiles for them."""

from typing import NamedTuple


class Target(NamedTuple):
  """The figures of a GPU that decide what XLA compiles for it.

  Attributes:
    name: name of the product.
    capability: compute capability, (major, minor).
    cores: number of multiprocessors.
    fpus: float32 units of a multiprocessor.
    threads: threads that a multiprocessor holds.
    shared_memory: bytes of shared memory of a multiprocessor.
    block_memory: bytes of shared memory that a block may ask for.
    l2: bytes of the L2 cache.
    memory: bytes of the device's memory.
    bandwidth: bytes of memory per second.
    clock: GHz.
  """

  name: str
  capability: tuple[int, int]
  cores: int
  fpus: int
  threads: int
  shared_memory: int
  block_memory: int
  l2: int
  memory: int
  bandwidth: int
  clock: float


TARGETS = {
  "h100": Target(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cores=132,
    fpus=128,
    threads=2048,
    shared_memory=233472,
    block_memory=232448,
    l2=52428800,
    memory=84942979072,
    bandwidth=3352320000000,
    clock=1.98,
  ),
  "h200": Target(
    name="NVIDIA H200",
    capability=(9, 0),
    cores=132,
    fpus=128,
    threads=2048,
    shared_memory=233472,
    block_memory=232448,
    l2=62914560,
    memory=151397597184,
    bandwidth=4800000000000,
    clock=1.98,
  ),
  "a100": Target(
    name="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    cores=108,
    fpus=64,
    threads=2048,
    shared_memory=167936,
    block_memory=166912,
    l2=41943040,
    memory=85100068864,
    bandwidth=2039040000000,
    clock=1.41,
  ),
  "rtx4090": Target(
    name="NVIDIA GeForce RTX 4090",
    capability=(8, 9),
    cores=128,
    fpus=128,
    threads=1536,
    shared_memory=102400,
    block_memory=101376,
    l2=75497472,
    memory=25393692672,
    bandwidth=1008096000000,
    clock=2.52,
  ),
  "t4": Target(
    name="Tesla T4",
    capability=(7, 5),
    cores=40,
    fpus=64,
    threads=1024,
    shared_memory=65536,
    block_memory=65536,
    l2=4194304,
    memory=15828320256,
    bandwidth=320064000000,
    clock=1.59,
  ),
}
"""Name on the command line to the figures of a GPU."""

_TEMPLATE = """gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {block_memory}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  name: "{name}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
  cub_version: "3.1.2"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def description(gpu: str) -> str:
  """Returns XLA's description of a GPU of TARGETS, the text of a GpuTargetConfigProto."""
  target = TARGETS[gpu]
  major, minor = target.capability
  extension = "ACCELERATED_FEATURES" if major == 9 else "NONE"
  return _TEMPLATE.format(**target._asdict(), major=major, minor=minor, extension=extension)
