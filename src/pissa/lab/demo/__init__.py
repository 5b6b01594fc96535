"""`pissa demo`: PiSSA and LoRA side by side on a real model, with a report."""
