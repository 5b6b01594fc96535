"""`python -m pissa`, for launchers such as `accelerate launch -m pissa train …`."""

from .cli.main import run

run()
