"""One module per exercise set: `set_01` holds the items of `solutions/01_*.py`."""
