"""The oracle: every stage in NumPy float64, written from the formulas.

It calls no tier of the package and no tier calls it.  Arrays of any float dtype are taken and
computed in float64; LSEs are in natural log; a row with nothing to attend to has output 0 and LSE
+inf.
"""
