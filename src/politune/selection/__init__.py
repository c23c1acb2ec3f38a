"""Choosing and drafting data with a model's help: a rubric answered for each row, and pairs drafted from topics."""
