"""Mamba2D: a selective state-space model that scans images natively in two dimensions."""
__version__ = "0.1.0"
