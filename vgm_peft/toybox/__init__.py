"""The Toybox: a rendered world of toys, the small base model trained on it, and the oracles that measure pictures of it."""
