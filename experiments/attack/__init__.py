"""Attacks on runs, each of which the program judges and counts by itself."""
