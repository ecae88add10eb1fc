"""Our kernels and their peers side by side: `python -m bench`."""
