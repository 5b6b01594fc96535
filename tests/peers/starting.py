"""How an adapter starts, and what becomes of the base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from observed import Seen, by_peft, failure, off, percent, raised
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import pissa
from pissa import PissaConfig, adapt, split_weight
from pissa.errors import PissaError
from pissa.live.quantized import keep_unpacked
from pissa.live.state import adapter_factors, adapter_layers, base_layer
from tiny import largest_difference, logits_of, tiny_llama, train_steps

RANK = 8


def decaying_matrix(size: int = 512) -> Tensor:
    """Singular values that fall as slowly as those of trained weights."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))
    return (U * torch.arange(1, size + 1).float().pow(-0.4)) @ V.T


def energy_loss(W: Tensor, low_rank: Tensor, rank: int) -> float:
    """Captured-energy loss against the exact SVD."""
    W, low_rank = W.double(), low_rank.double()
    best = torch.linalg.svdvals(W)[:rank].square().sum()
    return float(1 - (W.square().sum() - (W - low_rank).square().sum()) / best)


def loaded_4bit(place: Path, **settings: Any) -> Any:
    tiny_llama(hidden=64).save_pretrained(place)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)
    model = AutoModelForCausalLM.from_pretrained(place, quantization_config=config)
    keep_unpacked(model)
    return model.eval()


@failure("Fast SVD without oversampling, seed or error estimate")
def fast_svd(_: Path) -> Seen:
    W = decaying_matrix()
    theirs = []
    for seed in (0, 1):
        layer = nn.Sequential(nn.Linear(512, 512, bias=False))
        layer[0].weight = nn.Parameter(W.clone())
        torch.manual_seed(seed)
        how: Any = "pissa_niter_4"
        config = LoraConfig(r=32, lora_alpha=32, init_lora_weights=how, target_modules=["0"])
        adapted: Any = get_peft_model(layer, config)  # pyright: ignore
        theirs.append(W - base_layer(adapter_layers(adapted)["0"]).weight.detach())
    split, again = (split_weight(W, PissaConfig(32)) for _ in range(2))
    loss, ours = energy_loss(W, theirs[0], 32), energy_loss(W, split.scale * split.B @ split.A, 32)
    assert loss > 5 * ours and not torch.equal(theirs[0], theirs[1])
    assert torch.equal(split.A, again.A) and ours <= split.certificate.captured_energy_loss + 1e-7 <= 1e-3 + 1e-7
    return Seen(
        f"`pissa_niter_4` loses {100 * loss:.1f} % of the captured energy, other bits at every run",
        f"loses {100 * ours:.2f} %, certified to be below 0.1 %, same bits at every run",
    )


@failure("A saved adapter is decomposed again when it is loaded")
def reloading(scratch: Path) -> Seen:
    base = logits_of(tiny_llama())
    theirs = by_peft(tiny_llama(), "pissa_niter_1")
    theirs.save_pretrained(str(scratch / "theirs"))
    torch.manual_seed(1)
    peer = off(logits_of(PeftModel.from_pretrained(tiny_llama(), str(scratch / "theirs"))), base)
    model = adapt(tiny_llama(), PissaConfig(RANK))
    model.save_pretrained(str(scratch / "ours"))
    ours = off(logits_of(pissa.load(scratch / "ours", tiny_llama())), base)
    assert peer > 0.01 and ours < 1e-5
    return Seen(f"`pissa_niter_1`: {percent(peer)} before any training", f"never an SVD on loading: {percent(ours)}")


@failure("`disable_adapter()` is taken for the base")
def disabling(_: Path) -> Seen:
    base, found = logits_of(tiny_llama()), []
    for model in (by_peft(tiny_llama()), adapt(tiny_llama(), PissaConfig(RANK))):
        with model.disable_adapter():
            found.append(off(logits_of(model), base))
    assert found[0] > 0.1 and found[1] < 1e-5
    return Seen(f"gives the residual: {percent(found[0])}", f"gives the base: {percent(found[1])}")


@failure("A second PiSSA adapter on the same model")
def second_adapter(_: Path) -> Seen:
    base = logits_of(tiny_llama())
    theirs = by_peft(tiny_llama())
    theirs.add_adapter("second", theirs.peft_config["default"])
    first, config = off(logits_of(theirs), base), LoraConfig(r=RANK, target_modules=["q_proj"])
    config.init_lora_weights = "pissa"
    ours = adapt(tiny_llama(), PissaConfig(RANK))
    refusal = raised(lambda: ours.add_adapter("another", config), PissaError)
    ours.add_adapter("second", ours.peft_config["default"])
    kept = off(logits_of(ours), base)
    ours.set_adapter("second")
    second = off(logits_of(ours), base)
    assert first > 0.1 and max(kept, second) < 1e-5 and refusal == "PissaError"
    return Seen(
        f"takes the residual apart again: the first adapter's model is {percent(first)}",
        f"starts at the base: first and second {percent(max(kept, second))}; any other initialisation is refused",
    )


@failure("A tied output head is adapted")
def tied_head(_: Path) -> Seen:
    base = logits_of(tiny_llama(tie=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = by_peft(tiny_llama(tie=True), target_modules=["lm_head"], ensure_weight_tying=True)
        ours = adapt(tiny_llama(tie=True), PissaConfig(RANK, target_modules=["lm_head"]))
    peer, mine = off(logits_of(theirs), base), off(logits_of(ours), base)
    assert peer > 0.05 and mine < 1e-5
    return Seen(f"the input embedding changes with it: {percent(peer)}", f"untied with one warning: {percent(mine)}")


@failure("PiSSA on a base in 4 bits")
def four_bit_base(scratch: Path) -> Seen:
    kind = raised(lambda: by_peft(loaded_4bit(scratch / "theirs")), TypeError, ValueError)
    base = loaded_4bit(scratch / "ours")
    before = logits_of(base)
    model = adapt(base, PissaConfig(RANK, placement="offset"))
    start = off(logits_of(model), before)
    train_steps(model.train(), 2)
    with model.eval().disable_adapter():
        after = largest_difference(logits_of(model), before)
    assert start < 1e-5 and after == 0
    return Seen(f"{kind}", 'placement "offset": the base\'s function at step 0, its bits at any step')


@failure("PiSSA on a 4-bit base stored as floats (FSDP-QLoRA)")
def float_storage(scratch: Path) -> Seen:
    storage = {"bnb_4bit_quant_storage": torch.float32}
    theirs = by_peft(loaded_4bit(scratch / "theirs", **storage), target_modules=["q_proj"])
    held: list[Any] = [layer.lora_A["default"] for layer in adapter_layers(theirs).values()]
    shapes = {tuple(holder.weight.shape) for holder in held}
    assert shapes == {(1, 1)}
    raised(lambda: by_peft(loaded_4bit(scratch / "others", **storage)), RuntimeError)
    peer = "takes the packed bytes for numbers: 1 × 1 factors without a word, or an SVD of NaN that fails"
    base = loaded_4bit(scratch / "ours", **storage)
    before = logits_of(base)
    try:
        model = adapt(base, PissaConfig(RANK, placement="offset"))
    except PissaError as error:
        assert "\n" not in str(error)
        return Seen(peer, "refused by name")
    assert off(logits_of(model), before) < 1e-5
    assert all(len(f.A) == RANK for f in adapter_factors(model).values())
    return Seen(peer, "factors of the weights, same function")


@failure("A residual quantised with PiSSA (QPiSSA)")
def no_qpissa(_: Path) -> Seen:
    kind = raised(lambda: by_peft(tiny_llama(), "qpissa"), ValueError, KeyError)
    settings = {"qlora": pissa.quantization_preset("qlora"), "qpissa": pissa.Quantization()}
    errors = {}
    for name, how in settings.items():
        method: Any = "pissa" if name == "qpissa" else "lora-kaiming"
        model: Any = adapt(tiny_llama(hidden=64), PissaConfig(RANK, method=method, quantization=how))
        errors[name] = sum(c.rounding for c in model.pissa.certificates.values())
    gain = 100 * (1 - errors["qpissa"] / errors["qlora"])
    assert gain > 10
    return Seen(f"no such option: {kind}", f"in one step; the 4-bit error is {gain:.0f} % below QLoRA's")


@failure("LoftQ on a CPU")
def loftq_on_cpu(_: Path) -> Seen:
    from peft import LoftQConfig

    kind = raised(
        lambda: by_peft(tiny_llama(hidden=64), "loftq", loftq_config=LoftQConfig(loftq_bits=4)),
        AssertionError,
        RuntimeError,
        ValueError,
        NotImplementedError,
    )
    how = pissa.quantization_preset("loftq-5")
    model: Any = adapt(tiny_llama(hidden=64), PissaConfig(RANK, quantization=how))
    gap = max(c.rounding for c in model.pissa.certificates.values())
    assert 0 < gap < 0.2
    return Seen(f"{kind}", "runs")


@failure("AdaLoRA with PiSSA")
def adalora(_: Path) -> Seen:
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], init_lora_weights="pissa")
    theirs: Any = get_peft_model(tiny_llama(), config)  # pyright: ignore
    weights = {name: p for name, p in theirs.named_parameters() if ".lora_E." in name}
    assert weights and not any(p.any() for p in weights.values())
    base = logits_of(tiny_llama())
    model = adapt(tiny_llama(), PissaConfig(4, use_adalora=True))
    assert off(logits_of(model), base) < 1e-5
    return Seen("the setting is ignored, the adapter starts at zero", "starts at the principal components")


@failure("A rank above the smaller side of a weight")
def rank_too_large(_: Path) -> Seen:
    theirs = by_peft(tiny_llama(), rank=24, target_modules=["k_proj"])
    rank = len(adapter_factors(theirs)["model.layers.0.self_attn.k_proj"].A)
    assert rank == 16
    raised(lambda: adapt(tiny_llama(), PissaConfig(24, target_modules=["k_proj"])), PissaError)
    return Seen(f"cut from 24 to {rank} without a word", "refused, naming every such module")


@failure("Dropout with PiSSA")
def dropout(_: Path) -> Seen:
    base = logits_of(tiny_llama())
    theirs = by_peft(tiny_llama(), lora_dropout=0.05).train()
    torch.manual_seed(0)
    error = off(logits_of(theirs), base)
    assert error > 0.01
    raised(lambda: PissaConfig(RANK, dropout=0.05), PissaError)
    return Seen(f"0.05: the training forward is {percent(error)} at step 0", "refused, with the reason and the way out")
