"""`pissa inspect`: what a split would cost a model, layer kind by layer kind, before anything is changed."""
