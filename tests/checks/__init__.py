"""What `tests/gates.py` checks, one module a subject. Every check takes the folder of a project."""
