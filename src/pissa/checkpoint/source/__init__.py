"""Other people's models as they lie on a disk or a hub: found, checked, read tensor by tensor, or loaded."""
