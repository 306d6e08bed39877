"""aropt: an optimizing compiler for generation loops."""
