"""Configurations: one file per published result, and the digits demo."""
