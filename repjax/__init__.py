"""Structural re-parameterization for JAX: train with branches, ship the plain network."""

from repjax.models import create_model, init, list_models
from repjax.reparam import FOLDS, reparameterize

__all__ = ["FOLDS", "create_model", "init", "list_models", "reparameterize"]
