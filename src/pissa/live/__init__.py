"""Live models: which weights are adapted (`selection.py`, `targets.py`), the kinds of layers and how each shows its
weight as matrices (`layers.py`), where PEFT's layers compute something else and what mends it (`runtime.py`,
`conversion.py`), layers of bitsandbytes that hold ready codes (`quantized.py`), the steps of an adaptation
(`splits.py`, `peft_config.py`, `attach.py`; `adapted/adapt.py` takes them) and its placement beside an untouched base
(`offset.py`), the adapter's tensors as data (`state.py`), what tells one base from another (`identity.py`) and the
base's function back (`reference.py`). PEFT is the runtime; no layer code lives here.
"""
