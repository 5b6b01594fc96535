"""Optimizers of adapters: what moves the product B·A, not the two factors as if they had nothing to do with each other.

`product.py` has the mathematics, `pairs.py` finds a model's factors, `spectral.py` is the torch optimizer.
"""
