"""Live models: which modules are adapted (`targets.py`), how a layer kind shows its weight as a matrix (`layers.py`),
layers of bitsandbytes that hold ready codes (`quantized.py`), the adaptation itself (`apply.py`) and its placement
beside an untouched base (`offset.py`), the adapter's tensors as data (`state.py`) and the base's function back
(`reference.py`). PEFT is the runtime; no layer code lives here.
"""
