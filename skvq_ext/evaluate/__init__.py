"""Evaluation: what a cache costs a model in accuracy, under one protocol for all methods."""
