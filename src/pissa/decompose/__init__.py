"""One matrix -> low-rank factors. Tensors in, tensors out; torch alone.

`svd.py` finds the principal triplets, `gaussian.py` draws the LoRA baselines, `methods.py` maps a method's name to
its function.
"""
