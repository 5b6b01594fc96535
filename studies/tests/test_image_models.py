"""Pretraining teaches something, once."""

from __future__ import annotations

from pathlib import Path

import torch

from studies.image_models import SmallCnn, make_network, pretrained, with_new_head
from studies.images import accuracy, patterns
from tiny import same_tensors, snapshot


def test_pretraining_learns_and_is_read_back(tmp_path: Path) -> None:
    images = patterns(48, 3, 24)
    settings = {"classes": 3, "steps": 25, "batch_size": 12, "learning_rate": 3e-3, "about": {"what": "patterns"}}
    first = pretrained("cnn", images, tmp_path, **settings)
    assert accuracy(first, images) > 0.6 > accuracy(make_network("cnn", 24, 3), images)
    files = sorted(tmp_path.iterdir())
    again = pretrained("cnn", images, tmp_path, **settings)
    assert sorted(tmp_path.iterdir()) == files and len(files) == 1
    assert same_tensors(snapshot(first), snapshot(again))


def test_networks_are_the_same_for_the_same_seed_and_leave_the_global_generator() -> None:
    small = SmallCnn(3)
    before = torch.get_rng_state()
    for kind in ("vit", "cnn"):
        assert same_tensors(snapshot(make_network(kind, 16, 2)), snapshot(make_network(kind, 16, 2)))
        assert not same_tensors(snapshot(make_network(kind, 16, 2)), snapshot(make_network(kind, 16, 2, seed=1)))
    model = with_new_head(small, 7, seed=0)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 7)
    assert torch.equal(torch.get_rng_state(), before)
