"""Measuring a model's lean: instruments, and what their scores say."""
