"""Hooked models: loading them, and the few things ivlens asks of one."""

from ivlens.models.backend import Backend, Prefix
from ivlens.models.backends import backend_of
from ivlens.models.loading import load_model

__all__ = ["Backend", "Prefix", "backend_of", "load_model"]
