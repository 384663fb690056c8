"""The attention itself, usable alone: functional.py (what users call), ops.py, reference.py, hf.py."""
