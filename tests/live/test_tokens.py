"""Token ids that a model does not have are refused before it is changed."""

from __future__ import annotations

from typing import Any

import pytest

from pissa import PissaConfig, adapt
from pissa.errors import ConfigError
from tiny import same_tensors, snapshot, tiny_gpt2, tiny_llama


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([3, 100_000], "the input embedding has 384 rows and no 100000"),
        ({"nosuch": [1]}, "nosuch is no embedding of the model"),
        ({"norm": [1]}, "norm is no embedding of the model"),
        ({"q_proj": [1]}, "model.layers.0.self_attn.q_proj, .* gets an adapter as well"),
        ({"embed_tokens": [384]}, "embed_tokens has 384 rows and no 384"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(tokens: Any, said: str) -> None:
    model = tiny_llama()
    before, modules = snapshot(model), dict(model.named_modules())
    with pytest.raises(ConfigError, match=said):
        adapt(model, PissaConfig(2, trainable_token_indices=tokens))
    assert dict(model.named_modules()) == modules and same_tensors(before, snapshot(model))


@pytest.mark.parametrize(("make", "name"), [(tiny_llama, "embed_tokens"), (tiny_gpt2, "wte")])
def test_tokens_are_those_of_the_input_embedding_or_of_the_one_named(make: Any, name: str) -> None:
    for tokens in ([3, 7], {name: [3, 7]}):
        adapted = adapt(make(), PissaConfig(2, trainable_token_indices=tokens))
        [delta] = [p for n, p in adapted.named_parameters() if "trainable_tokens_delta" in n and p.requires_grad]
        assert len(delta) == 2
