"""Measurements on models and their results: attention, gradients, synergy between the tasks."""
