"""All properties of this folder."""

import adapting  # noqa: F401
import decomposing  # noqa: F401
import quantizing  # noqa: F401
from registry import PROPERTIES as PROPERTIES
from registry import Unavailable as Unavailable
