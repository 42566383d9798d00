"""Files whose tensors are well and whose texts are not: metadata, settings beside the file, names that meet; and sizes that
would grow while a file is read. Each by its name; `hostile` has the files that they are made from.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tests.formats.hostile import ATTENTION, FLAT, Stranger, good

DEEP = "[" * 100_000
SITE = ["unet", f"{ATTENTION}.to_k", "linear", [16, 32], "weight"]


def _patches(kind: object = "lora", options: object = None, sites: object = None) -> str:
    return json.dumps([{"kind": kind, "options": options or {"rank": 2}, "sites": sites or [SITE]}])


NATIVE: Mapping[str, Mapping[str, str]] = {
    "another version": {"version": "2\n\x1b[31m"},
    "no family": {"family": ""},
    "a family like a path": {"family": "../../sd15"},
    "patches are nested deep": {"patches": DEEP},
    "patches are a number": {"patches": "1"},
    "patches are numbers": {"patches": "[1, 2]"},
    "patches are nested lists": {"patches": "[[[]]]"},
    "an unknown kind": {"patches": _patches("__import__('os')")},
    "a kind that is a list": {"patches": _patches(["lora"])},
    "a kind of 10 KB": {"patches": _patches("\n" * 10_000)},
    "an unknown option": {"patches": _patches(options={"__class__": "x" * 10_000})},
    "options are a list": {"patches": _patches(options=[1])},
    "an alpha that is NaN": {"patches": '[{"kind":"lora","options":{"rank":2,"alpha":NaN},"sites":[]}]'},
    "an alpha beyond floats": {"patches": '[{"kind":"lora","options":{"rank":2,"alpha":1e999},"sites":[]}]'},
    "an alpha below zero": {"patches": _patches(options={"rank": 2, "alpha": -1.0})},
    "a rank of 10^9": {"patches": _patches(options={"rank": 10**9})},
    "a rank of 10^18": {"patches": _patches(options={"rank": 10**18})},
    "a rank of 10^30": {"patches": _patches(options={"rank": 10**30})},
    "a rank that is negative": {"patches": _patches(options={"rank": -1})},
    "a rank that is true": {"patches": _patches(options={"rank": True})},
    "blocks of 10^9": {"patches": _patches("oft", {"block": 10**9})},
    "factors beyond counting": {"patches": _patches("boft", {"factors": 10**12})},
    "frequencies beyond counting": {"patches": _patches("fourierft", {"frequencies": 10**18})},
    "a site without axes": {"patches": _patches(sites=[["unet", "a", "linear", [], "weight"]])},
    "a site with one axis": {"patches": _patches("glora", {"rank": 1}, [["unet", "a", "linear", [4], "weight"]])},
    "a site with 1,000 axes": {"patches": _patches(sites=[["unet", "a", "conv", [2] * 1000, "weight"]])},
    "a site beyond memory": {"patches": _patches("diff", {}, [["unet", "a", "conv", [2**23] * 5, "weight"]])},
    "a site of length 0": {"patches": _patches(sites=[["unet", "a", "linear", [0, 4], "weight"]])},
    "a site that is a text": {"patches": _patches(sites=["abcde"])},
    "a site whose shape is a table": {"patches": _patches(sites=[["unet", "a", "linear", {}, "weight"]])},
    "a site whose part is a list": {"patches": _patches(sites=[[[], {}, "linear", [16, 32], "weight"]])},
    "a site of another operation": {"patches": _patches("krona", {}, [["unet", "a", "norm", [16], "weight"]])},
    "a site called like an attribute": {"patches": _patches(sites=[["__class__", "__init__", "linear", [16, 32], "weight"]])},
    "a site twice": {"patches": _patches(sites=[SITE, SITE])},
    "the order has numbers": {"order": "[1, 2]"},
    "the order has one site twice": {"order": json.dumps([f"unet.{ATTENTION}.to_k.weight"] * 2)},
    "words are a table": {"words": "{}"},
    "a word is a number": {"words": "[1]"},
    "a word without a name": {"words": '[""]'},
    "a word twice": {"words": '["<a>", "<a>"]'},
    "more words than rows": {"words": '["<a>", "<b>"]'},
    "a word leads that is not there": {"leads": '["<b>"]'},
    "the leads are nested deep": {"leads": DEEP},
}  # fmt: skip

PEFT: Mapping[str, str] = {
    "no JSON": "{",
    "a list": "[]",
    "nested deep": DEEP,
    "not UTF-8 but in name": "\ufffd",
    "a kind of its own": json.dumps({"peft_type": "__import__('os').system('true')"}),
    "a kind that is a list": json.dumps({"peft_type": ["LORA"]}),
    "no kind": json.dumps({"auto_mapping": {"parent_library": "evil.module"}}),
    "another kind than its tensors": json.dumps({"peft_type": "LOHA"}),
    "an alpha that is NaN": '{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}',
    "an alpha beyond floats": '{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}',
    "an alpha of 10^30": '{"peft_type": "LORA", "r": 2, "lora_alpha": 1e30}',
    "an alpha below zero": '{"peft_type": "LORA", "r": 2, "lora_alpha": -1}',
    "an alpha of 400 digits": '{"peft_type": "LORA", "r": 2, "lora_alpha": 1%s}' % ("0" * 400),
    "an alpha that is a text": json.dumps({"peft_type": "LORA", "lora_alpha": "__import__('os')"}),
    "an alpha that is true": json.dumps({"peft_type": "LORA", "lora_alpha": True}),
    "a pattern that takes for ever": json.dumps({"peft_type": "LORA", "alpha_pattern": {"(a+)+$": 2}, "lora_alpha": 2}),
    "a pattern with NUL": json.dumps({"peft_type": "LORA", "alpha_pattern": {"to_k\0": 2}, "lora_alpha": 2}),
    "a pattern whose alpha is a list": json.dumps({"peft_type": "LORA", "alpha_pattern": {"to_k": []}, "lora_alpha": 2}),
    "a start that changes the base": json.dumps({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}),
    "a start that is a list": json.dumps({"peft_type": "LORA", "init_lora_weights": ["x"], "use_qalora": [[]]}),
    "layers that are replicated": json.dumps({"peft_type": "LORA", "layer_replication": [[0, 4], [2, 5]]}),
}  # fmt: skip

OFT: Mapping[str, str] = {
    "10^9 terms": '"num_cayley_neumann_terms": 1000000000',
    "terms that are NaN": '"num_cayley_neumann_terms": NaN',
    "terms that are infinite": '"num_cayley_neumann_terms": -1e999',
    "terms that are a list": '"num_cayley_neumann_terms": []',
    "the constrained kind": '"coft": true',
}

ALPHAS = {"NaN": float("nan"), "infinite": float("inf"), "below zero": -1.0, "10^30": 1e30, "two numbers": (1.0, 2.0)}

NUMBERED: Mapping[str, Mapping[str, str]] = {
    "no classes": {"text_encoder": ""},
    "classes that are none": {"text_encoder": '["os.system"]'},
    "classes that are no list": {"text_encoder": "1"},
    "classes that are nested deep": {"text_encoder": DEEP},
    "more than classes": {"text_encoder": '[], "names": 1'},
}


def _grown() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Small files of outer products: what they multiply to would take terabytes, or what is made for them would."""
    wide, high, one = torch.ones(1, 1_000_000), torch.ones(1_000_000, 1), torch.ones(1, 1)
    name = f"{FLAT}_to_k"
    yield "loha", {f"{name}.hada_w{n}_{half}": high for n in (1, 2) for half in "ab"}
    yield (
        "loha in Tucker form",
        {
            **{f"{name}.hada_w{n}_{half}": high for n in (1, 2) for half in "ab"},
            **{f"{name}.hada_t{n}": torch.ones(1, 1, 1, 1) for n in (1, 2)},
        },
    )
    yield "lokr, left", {f"{name}.lokr_w1_a": high, f"{name}.lokr_w1_b": wide, f"{name}.lokr_w2": one}
    yield "lokr, right", {f"{name}.lokr_w1": one, f"{name}.lokr_w2_a": high, f"{name}.lokr_w2_b": high}
    yield "glora", {f"{name}.{factor}.weight": wide for factor in ("a1", "a2", "b1", "b2")}
    core = {f"{name}.lora_mid.weight": high[..., None, None], f"{name}.lora_up.weight": wide}
    yield "lora in Tucker form", {f"{name}.lora_down.weight": wide, **core}


def hostile_texts() -> Iterator[tuple[str, Stranger, bytes]]:
    """Yield each of these files: what it is called, the file, its bytes."""
    for name, file in _files():
        yield name, file, file.raw()


def _files() -> Iterator[tuple[str, Stranger]]:
    files = good()
    native, kohya, numbered = files["native"], files["kohya"], files["numbered"]
    for name, texts in NATIVE.items():
        said = {**native.metadata, **{f"vgm_peft.{key}": text for key, text in texts.items()}}
        yield f"native: {name}", replace(native, metadata=said)
    for name, text in PEFT.items():
        yield f"peft: settings: {name}", replace(files["peft"], beside={"adapter_config.json": text})
        own = text.replace('"lora_alpha"', '"unet.lora_alpha"').replace('"alpha_', '"unet.alpha_')
        spoken = {"lora_adapter_metadata": own}
        if "alpha" in name and "lora_alpha" in text or text[:1] != "{":
            yield f"diffusers: settings: {name}", replace(files["diffusers with alphas"], metadata=spoken)
    for name, text in OFT.items():
        yield f"peft oft: {name}", replace(files["peft oft"], beside={"adapter_config.json": f'{{"peft_type": "OFT", {text}}}'})
    for layout in ("kohya", "lycoris", "dora", "loha", "lokr", "glora"):
        alpha = next(name for name in files["kohya" if layout == "dora" else layout].tensors if name.endswith(".alpha"))
        for name, value in ALPHAS.items():
            yield (
                f"{layout}: an alpha that is {name}",
                replace(files[layout], tensors={**files[layout].tensors, alpha: torch.tensor(value)}),
            )
    for name, said in NUMBERED.items():
        yield f"numbered: {name}", replace(numbered, metadata=said)
    again = {**numbered.tensors, "text_encoder:01:up": numbered.tensors["text_encoder:1:up"] * 2}
    yield "numbered: one number in two spellings", replace(numbered, tensors=again)
    for name, tensors in _met(kohya):
        yield name, Stranger(tensors)
    for name, tensors in _grown():
        yield f"terabytes: {name}", Stranger(tensors)


def _met(kohya: Stranger) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Names that meet in one layer."""
    pair = dict(kohya.tensors)
    k = {name.removeprefix(FLAT): tensor for name, tensor in pair.items() if "_to_k" in name}
    original = "lora_unet_middle_block_1_transformer_blocks_0_attn2"
    yield "a layer in two spellings", {**pair, **{f"{original}{name}": tensor for name, tensor in k.items()}}
    yield "a tensor in two spellings", {**pair, f"{FLAT}_to_k.lora.down.weight": torch.ones(2, 32)}
    yield "two kinds on one layer", {**pair, f"{FLAT}_to_k.diff": torch.ones(16, 32)}
    yield "two kinds of one product", {**pair, **{f"{FLAT}_to_k.hada_w{n}_{h}": torch.ones(2, 2) for n in (1, 2) for h in "ab"}}
    yield "an alpha by itself", {**pair, "lora_unet_conv_in.alpha": torch.tensor(1.0)}
    yield "a text encoder of another family", {**pair, "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}
    yield "a bias without a layer", {**pair, f"{FLAT}_to_k.diff_b": torch.ones(16)}
    yield "a token without a name", {**pair, "bundle_emb..emb_params": torch.ones(1, 32)}
    yield "a token of three axes", {**pair, "bundle_emb.toy.emb_params": torch.ones(1, 1, 32)}
    yield (
        "tokens of two encoders where there is one",
        {f"bundle_emb.toy.{key}": torch.ones(1, width) for key, width in (("clip_l", 32), ("clip_g", 64))},
    )
