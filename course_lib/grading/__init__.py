"""Exercises: what an item is, how an answer is judged, how notebooks are built and submissions graded."""
