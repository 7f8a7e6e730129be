"""Sweeps: many runs side by side under one folder, how they are started and what they say together."""
