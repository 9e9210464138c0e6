"""Evaluation: text similarity, classification, generation, anisotropy, and how two results compare."""
