"""What the user asks for: frozen dataclasses whose fields check themselves.

settings.py      what a declared field is: its check, its reading from text, its help
kinds.py         the types of fields, with what is allowed of them
adapter.py       the settings that `PissaConfig` and `Recipe` share
quantization.py  `Quantization` and its presets
pissa_config.py  `PissaConfig`
"""

from .adapter import ALGORITHMS, COMPONENTS, CUR_CORES, METHODS, PLACEMENTS, AdapterSettings
from .adapter import Algorithm as Algorithm
from .adapter import Component as Component
from .adapter import CurCore as CurCore
from .adapter import Method as Method
from .adapter import Placement as Placement
from .pissa_config import PissaConfig
from .quantization import PRESETS, Quantization, quantization_preset
from .quantization import QuantizationFormat as QuantizationFormat
from .quantization import QuantizationMethod as QuantizationMethod
from .quantization import Rounding as Rounding
from .quantization import ScaleSearch as ScaleSearch

__all__ = [
    "ALGORITHMS", "COMPONENTS", "CUR_CORES", "METHODS", "PLACEMENTS", "PRESETS", "AdapterSettings", "PissaConfig",
    "Quantization", "quantization_preset",
]  # fmt: skip
