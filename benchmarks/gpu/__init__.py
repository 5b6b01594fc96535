"""One prepared pass over a single GPU, `make gpu`: correctness, decompositions, initialisation and training steps.

`sizes.py` says how large everything is, in full and tiny; `stages.py` lists the stages with their time limits; each has
a file of its own with a function `run`. `orchestrate.py` runs each in a process of its own, so that one that fails, is
killed or takes too long stops no other, and writes one JSON after each. `page.py` makes docs/gpu.md of it.

    make gpu                                        on this machine, in .venv
    make gpu GPU_PYTHON=python3 GPU_OUT=results     with what an image holds, without `make setup`
    python -m benchmarks.gpu --tiny                 the same code on a CPU, in tiny
"""
