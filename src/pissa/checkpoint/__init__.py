"""Models and adapters on disk: `write.py` makes files appear whole or not at all, `manifest.py` is `pissa.json`,
`read.py` loads bases and adapters and refuses what is incomplete, `residual.py` saves residuals for transformers to
load.
"""
