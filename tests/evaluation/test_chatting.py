"""A chat says what generation says, remembers what its template can hold, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pissa import PissaConfig, adapt
from pissa.errors import ConfigError, DataError
from pissa.evaluation.chat import Chat
from pissa.evaluation.chat_options import ChatOptions
from pissa.evaluation.generate import generate
from pissa.evaluation.load import Subject
from tiny import global_generators, snapshot, tiny_llama, tiny_tokenizer, train_steps

END_OF_TURN_ID = 3
FIRST = "[user]\na<end>\n[assistant]\n"


def outspoken(seed: int = 3) -> Any:
    """A model of clear preferences."""
    model = tiny_llama(seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def chat(model: Any = None, tokenizer: Any = None, *, of_base: bool = False, **options: Any) -> Chat:
    subject = Subject(model or outspoken(), tokenizer or tiny_tokenizer(), None)
    return Chat("it", subject, ChatOptions(**{"max_new_tokens": 12, **options}), of_base=of_base)


@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        (
            "chat",
            "[user]\na<end>\n[assistant]\n",
            "[user]\na<end>\n[assistant]\n{}<end>\n[user]\nb<end>\n[assistant]\n",
        ),
        ("none", "a", "b"),
    ],
)
def test_a_reply_is_what_generation_gives_for_the_conversation(template: Any, first: str, second: str) -> None:
    talk, model, tokenizer = chat(template=template), outspoken(), tiny_tokenizer()
    for prompt, whole in (("a", first), ("b", second)):
        shown: list[str] = []
        if prompt == "a":
            reply = earlier = talk.reply(prompt, shown.append)
        else:
            whole, reply = whole.format(earlier.text), talk.reply(prompt, shown.append)
        [expected] = generate(model, tokenizer, [whole], max_new_tokens=12, batch_size=1, add_bos=template != "chat")
        assert reply.text == expected and "".join(shown) == expected
    assert earlier.text != reply.text
    talk.reset()
    assert talk.reply("a") == earlier


def test_without_history_a_prompt_stands_alone_and_a_system_message_stays() -> None:
    talk = chat(history=False, system="Be brief.")
    first = talk.reply("a")
    assert talk.reply("a") == first != chat(history=False).reply("a")


def test_a_reply_ends_where_the_model_ends_it_and_is_cut_at_its_length() -> None:
    model, tokenizer = outspoken(), tiny_tokenizer()
    assert chat(model, tokenizer).reply("a")[1:] == ("length", 12)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        ids = torch.tensor([tokenizer(FIRST)["input_ids"]])
        model.lm_head.weight[END_OF_TURN_ID] = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
    assert chat(model, tokenizer).reply("a") == ("", "stop", 1)


def test_what_is_drawn_depends_on_the_seed_alone_and_moves_no_generator() -> None:
    before = global_generators()
    replies = {seed: chat(tiny_llama(), temperature=1.0, seed=seed).reply("a") for seed in (0, 1)}
    assert replies[0] != replies[1] and chat(tiny_llama(), temperature=1.0).reply("a") == replies[0]
    assert chat(tiny_llama(), temperature=1.0, top_k=1).reply("a") == chat(tiny_llama()).reply("a")
    assert global_generators() == before


@pytest.mark.parametrize("placement", ["residual", "offset"])
def test_the_base_of_an_adapter_replies_as_the_base_does(placement: Any) -> None:
    adapted = adapt(outspoken(), PissaConfig(4, placement=placement))
    train_steps(adapted, 3)
    adapted.eval()
    before = snapshot(adapted)
    assert chat(adapted, of_base=True).reply("a") == chat().reply("a") != chat(adapted).reply("a")
    after = snapshot(adapted)
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_ctrl_c_ends_a_reply_and_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    talk, shown = chat(), []
    model = talk._model
    calls, own = [], model.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return own(*arguments, **options)

    monkeypatch.setattr(model, "forward", forward)
    reply = talk.reply("a", shown.append)
    assert reply.end == "interrupted" and reply.tokens == 4 and "".join(shown) == reply.text
    monkeypatch.undo()
    after = talk.reply("b")
    whole = f"{FIRST}{reply.text}<end>\n[user]\nb<end>\n[assistant]\n"
    assert [after.text] == generate(
        outspoken(), tiny_tokenizer(), [whole], max_new_tokens=12, batch_size=1, add_bos=False
    )


def test_a_conversation_longer_than_the_model_holds_is_refused_and_not_remembered() -> None:
    model = outspoken()
    model.config.max_position_embeddings = 40
    talk = chat(model)
    first = talk.reply("a")
    with pytest.raises(DataError, match="and the model holds 40; /reset forgets it"):
        talk.reply("word " * 40)
    talk.reset()
    assert talk.reply("a") == first


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"top_p": 0.9}, "top_p without a temperature: nothing is drawn; add --temperature 0.7"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p is 0.0; allowed: above 0, up to 1"),
        ({"temperature": -1.0}, "temperature is -1.0; give 0 or a positive number"),
        ({"system": "s", "template": "alpaca"}, "template 'alpaca' holds no system message; leave --system out"),
    ],
)
def test_settings_that_nothing_would_use_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        chat(**options)
    assert complaint in str(refused.value)
