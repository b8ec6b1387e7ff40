"""STARFlow2 in JAX: one causal model that reads and writes text and images."""

__version__ = "0.1.0"
