"""Measures the package's operations beside whatever else the environment holds.

``cases`` says what is measured, ``problems`` makes the tensors, ``timing`` the clock, ``roofline``
what to expect, ``peers`` who else can do it, ``run`` ties them together and ``plots`` draws them.
"""
