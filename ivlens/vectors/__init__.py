"""Instruction vectors: what they are, and making them."""

from ivlens.vectors.extraction import extract_vector, vector_from_heads
from ivlens.vectors.vector import InstructionVector

__all__ = ["InstructionVector", "extract_vector", "vector_from_heads"]
