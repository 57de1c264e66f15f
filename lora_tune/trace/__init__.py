"""The exact tier of the estimate: a real training step on the meta device, every storage counted."""
