"""Live models: which modules are adapted (`targets.py`), how a layer kind shows its weight as a matrix (`layers.py`),
the adaptation itself (`apply.py`), the adapter's tensors as data (`state.py`) and the base's function back
(`reference.py`). PEFT is the runtime; no layer code lives here.
"""
