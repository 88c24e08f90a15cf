"""Training by a recipe: the loop, and what stands around it."""
