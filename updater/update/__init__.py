"""One update, from the choice of its batch to its decision; ``updates.py`` is the whole of it."""
