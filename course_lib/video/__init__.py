"""Video: image models that learn to move."""
