"""Inference: compiled ahead of time."""

from repjax.deploy.compile import CompiledModel, compile  # noqa: A004
from repjax.deploy.devices import Plan

__all__ = ["CompiledModel", "Plan", "compile"]
