"""Targets: what a program can be lowered to."""
