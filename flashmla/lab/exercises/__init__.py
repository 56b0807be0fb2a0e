"""Checkers of the lessons' exercises, a module a stage: each raises until the answer is right."""
