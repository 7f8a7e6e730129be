"""Sweeps: many runs side by side under one folder, and what they say together."""
