"""What every method costs: its training step over the same step with plain LoRA, and beside peft and lycoris-lora.

One step is noise, U-Net forward, loss, backward, AdamW, on the whole of Toybox's U-Net; only what is attached to it differs.
For each method at its own layers (those that its literature trains) there run side by side, turn about, within one process:

- the method as it is here,
- LoRA as it is here with about as many trained values: on the same layers, or on the attention where those hold no matrices,
- peft's and LyCORIS' implementation of the same method with the same settings on the same layers, where they have one.

Looked at is the median over the rounds of the ratio within a round, of processor time (other work on the machine makes
time on the wall wander several-fold; the JSON has both). Memory is what the step holds at the end of the forward, counted and
not sampled: the U-Net, what is trained with its gradient and AdamW's two moments, what is frozen beside it, and every tensor
that autograd has saved (each storage once). What an operation needs for itself while it runs is not in it.

    python benchmarks/methods.py [--methods lokr,dora] [--rounds 12] [--batch 2] [--json FILE]
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from step import STAND_IN, Span, examples, get_base  # noqa: E402

from vgm_peft.attachment import Attachment  # noqa: E402
from vgm_peft.config import build  # noqa: E402
from vgm_peft.delta import Delta  # noqa: E402
from vgm_peft.deltas import TABLE, method_named  # noqa: E402
from vgm_peft.errors import VgmError  # noqa: E402
from vgm_peft.family import Base  # noqa: E402
from vgm_peft.site import Site, choose  # noqa: E402

Options = dict[str, Any]
Batches = list[tuple[Tensor, Tensor, Tensor, Tensor]]
NEAR = 0.1
"""Share by which the values trained by two programs may differ before the table says so."""


# --- the cases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One method: settings here, and what says the same to the others (`None`: they do not have it)."""

    kind: str
    options: Options = field(default_factory=dict[str, Any])
    target: float | None = None
    """Step time over LoRA's that is wanted (issue 3, "Cost")."""
    peft: tuple[str, Options] | None = None
    lycoris: tuple[str, Options] | None = None


def _cases() -> dict[str, Case]:
    """Defaults where they fit Toybox's narrow layers (32 to 256 wide), else the nearest that do."""
    r8: Options = {"r": 8, "lora_alpha": 8}
    ly8: Options = {"lora_dim": 8, "alpha": 8}
    return {
        "lora": Case("lora", target=1.0, peft=("LoraConfig", r8), lycoris=("locon.LoConModule", ly8)),
        "dora": Case(
            "dora",
            target=1.25,
            peft=("LoraConfig", {**r8, "use_dora": True}),
            lycoris=("locon.LoConModule", {**ly8, "weight_decompose": True}),
        ),
        "pissa": Case("pissa", target=1.1, peft=("LoraConfig", {**r8, "init_lora_weights": "pissa"})),
        "dylora": Case("dylora", target=1.1, lycoris=("dylora.DyLoraModule", {**ly8, "block_size": 1})),
        "tlora": Case("tlora", target=1.1),
        "krona": Case("krona", target=1.1),
        "lokr": Case(
            "lokr",
            target=1.1,
            peft=("LoKrConfig", {"r": 4, "alpha": 4}),
            lycoris=("lokr.LokrModule", {"lora_dim": 4, "alpha": 4}),
        ),
        "loha": Case(
            "loha",
            {"rank": 4},
            1.25,
            ("LoHaConfig", {"r": 4, "alpha": 1}),
            ("loha.LohaModule", {"lora_dim": 4, "alpha": 1}),
        ),
        "oft": Case("oft", {"block": 4}, 1.1, lycoris=("diag_oft.DiagOFTModule", {"lora_dim": 4})),
        "oft-input": Case("oft", {"side": "input", "terms": 5}, 1.1, ("OFTConfig", {"oft_block_size": 32})),
        "boft": Case(
            "boft",
            target=1.25,
            peft=("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 4}),
            lycoris=("boft.ButterflyOFTModule", {"lora_dim": 4}),
        ),
        "hra": Case("hra", target=1.25, peft=("HRAConfig", {"r": 8})),
        "glora": Case("glora", target=1.1, lycoris=("glora.GLoRAModule", {"lora_dim": 4, "alpha": 4})),
        "ia3": Case("ia3", target=1.1, peft=("IA3Config", {"feedforward_modules": []}), lycoris=("ia3.IA3Module", {})),
        "diff": Case("diff", target=1.6, lycoris=("full.FullModule", {})),
        "bitfit": Case("bitfit", target=1.1),
        "norm": Case("norm", target=1.1, peft=("LNTuningConfig", {}), lycoris=("norms.NormModule", {})),
        "difffit": Case("difffit", target=1.1),
        "svdiff": Case("svdiff", target=1.6),
        "vera": Case("vera", {"rank": 64}, peft=("VeraConfig", {"r": 64})),
        "fourierft": Case("fourierft", peft=("FourierFTConfig", {"n_frequency": 1000})),
        "c3a": Case("c3a", {"block": 32}, peft=("C3AConfig", {"block_size": 32, "init_weights": True})),
    }


# --- what takes part ---------------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """One U-Net with something on it, and the step that trains that."""

    name: str
    unet: nn.Module
    trained: list[nn.Parameter]
    step: Callable[[], float]
    spans: list[Span] = field(default_factory=list[Span])
    held: int = 0
    """Bytes held at the end of a forward."""

    @property
    def values(self) -> int:
        return sum(p.numel() for p in self.trained)


Attach = Callable[[nn.Module], list[nn.Parameter]]
"""Put something on a U-Net and return what is trained of it."""


def runner(name: str, base: Base, batches: Batches, attach: Attach) -> Runner:
    """Copy the U-Net, attach, and make the step, the same for all but for what is attached."""
    unet = deepcopy(cast(nn.Module, base.denoiser)).train().requires_grad_(False)
    trained = attach(unet)
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    turn, saved = iter(range(10**9)), _Saved(unet)

    def loss() -> Tensor:
        x0, hidden, noise, t = batches[next(turn) % len(batches)]
        noisy = base.process.corrupt(x0, noise, t)
        prediction = cast(Any, unet)(noisy, t, encoder_hidden_states=hidden, return_dict=False)[0]
        return F.mse_loss(prediction.float(), base.process.target(x0, noise, t).float())

    def step() -> float:
        value = loss()
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(value.detach())

    out = Runner(name, unet, trained, step)
    with torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor):
        value = loss()
    out.held = saved.bytes + _bytes(unet, trained)
    value.backward()
    optimiser.zero_grad()
    return out


class _Saved:
    """Counts the storages that autograd saves, each once, but for the model's own parameters and buffers."""

    def __init__(self, unet: nn.Module) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in (*unet.parameters(), *unet.buffers())}
        self._seen: set[int] = set()
        self.bytes = 0

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self._own and place not in self._seen:
            self._seen.add(place)  # saved, so alive until the backward: no other storage can get this place
            self.bytes += storage.nbytes()
        return tensor


def _bytes(unet: nn.Module, trained: Sequence[nn.Parameter]) -> int:
    """The U-Net with all that is on it, and gradient and two moments of what is trained."""
    tensors = {id(t): t for t in (*unet.parameters(), *unet.buffers(), *trained)}
    return sum(t.untyped_storage().nbytes() for t in tensors.values()) + 3 * sum(4 * p.numel() for p in trained)


def ours(sites: Sequence[Site], kind: str, options: Options) -> Attach:
    """A method of this package."""
    method = method_named(kind)

    def attach(unet: nn.Module) -> list[nn.Parameter]:
        delta = Delta.fit("sd15", method, sites, build(method.Options, options)).start({"unet": unet})
        Attachment({"unet": unet}, delta)
        return [p for _, p in delta.parameters() if p.requires_grad]

    return attach


def of_peft(sites: Sequence[Site], config: str, options: Options) -> Attach:
    """The same through peft."""

    def attach(unet: nn.Module) -> list[nn.Parameter]:
        import peft

        modules = list(dict.fromkeys(site.module for site in sites))
        put = peft.get_peft_model if config == "VeraConfig" else lambda model, told: peft.inject_adapter_in_model(told, model)
        put(cast(Any, unet), getattr(peft, config)(target_modules=modules, **options))  # either changes `unet` in place
        return [p for p in unet.parameters() if p.requires_grad]

    return attach


def of_lycoris(sites: Sequence[Site], place: str, options: Options) -> Attach:
    """The same through LyCORIS' modules, one a layer, which take the place of the layer's forward."""
    import importlib

    def attach(unet: nn.Module) -> list[nn.Parameter]:
        file, name = place.split(".")
        kind = getattr(importlib.import_module(f"lycoris.modules.{file}"), name)
        trained: list[nn.Parameter] = []
        for module in dict.fromkeys(site.module for site in sites):
            theirs = kind(module.replace(".", "_"), unet.get_submodule(module), 1.0, **options).train()
            theirs.apply_to()
            trained += [p for p in theirs.parameters() if p.requires_grad]
        return [p.requires_grad_() for p in dict.fromkeys(trained)]

    return attach


def equal_lora(base: Base, sites: Sequence[Site], values: int) -> tuple[list[Site], int]:
    """The sites and the rank (1 up to the narrowest layer's side) at which a LoRA trains about so many values."""
    if any(site.op not in ("linear", "conv") for site in sites):
        sites = choose(base.sites, ["attention"], base.family.presets)
    per_rank = sum(site.rows + site.columns for site in sites)
    most = min(min(site.rows, site.columns) for site in sites)
    return list(sites), min(max(1, round(values / per_rank)), most)


# --- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One method, measured."""

    name: str
    sites: int
    values: int
    lora_rank: int
    lora_values: int
    target: float | None
    step_ms: float
    """Median of processor time."""
    over_lora: float
    quartiles: tuple[float, float]
    over_lora_wall: float
    memory_over_lora: float
    others: Mapping[str, "Other"]
    """Program -> what its step costs over ours."""


@dataclass(frozen=True)
class Other:
    """Another program beside ours: its step and memory over ours, and how many values it trains."""

    step: float
    memory: float
    values: int


def measure(name: str, case: Case, base: Base, batches: Batches, rounds: int) -> Result:
    """Run one method beside LoRA and the other programs, turn about."""
    method = method_named(case.kind)
    sites = choose(base.sites, method.where, base.family.presets, method.ops)
    first = runner("ours", base, batches, ours(sites, case.kind, case.options))
    lora_sites, rank = equal_lora(base, sites, first.values)
    runners = [first, runner("lora", base, batches, ours(lora_sites, "lora", {"rank": rank}))]
    for label, maker, told in (("peft", of_peft, case.peft), ("lycoris", of_lycoris, case.lycoris)):
        if told is not None:
            try:
                runners.append(runner(label, base, batches, maker(sites, *told)))
            except Exception as error:  # noqa: BLE001 - what another program cannot do is a finding, not our fault
                print(f"{name}: {label} fails: {type(error).__name__}: {str(error)[:160]}", file=sys.stderr)
    _take_turns(runners, rounds)
    return _result(name, case, len(sites), rank, runners)


def _take_turns(runners: Sequence[Runner], rounds: int) -> None:
    for each in runners:
        each.step()
    gc.collect()
    gc.disable()
    for number in range(rounds):
        shift = number % len(runners)
        for each in (*runners[shift:], *runners[:shift]):
            wall, cpu = time.perf_counter(), time.process_time()
            each.step()
            each.spans.append(Span(time.perf_counter() - wall, time.process_time() - cpu))
    gc.enable()


def _result(name: str, case: Case, sites: int, rank: int, runners: Sequence[Runner]) -> Result:
    mine, lora, *others = runners
    ratios = [a.cpu / b.cpu for a, b in zip(mine.spans, lora.spans, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Result(
        name,
        sites,
        mine.values,
        rank,
        lora.values,
        case.target,
        1e3 * statistics.median(s.cpu for s in mine.spans),
        middle,
        (low, high),
        statistics.median(a.wall / b.wall for a, b in zip(mine.spans, lora.spans, strict=True)),
        mine.held / lora.held,
        {
            o.name: Other(
                statistics.median(a.cpu / b.cpu for a, b in zip(o.spans, mine.spans, strict=True)), o.held / mine.held, o.values
            )
            for o in others
        },
    )


# --- telling -----------------------------------------------------------------------------------------------------------

HEAD = (
    "| method | layers | trained | LoRA rank | step, ms | step / LoRA | quartiles | wanted | memory / LoRA | "
    "peft / ours | LyCORIS / ours |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(r: Result) -> str:
    """One line of the table."""

    def other(name: str) -> str:
        found = r.others.get(name)
        if found is None:
            return ""
        differs = abs(found.values / r.values - 1) > NEAR
        return f"{found.step:.2f}" + (f" ({found.values / r.values:.2g}x values)" if differs else "")

    cells = (
        r.name,
        f"{r.sites}",
        f"{r.values:,}",
        f"{r.lora_rank}" + ("" if abs(r.lora_values / r.values - 1) <= 0.5 else f" ({r.lora_values / r.values:.2g}x values)"),
        f"{r.step_ms:.0f}",
        f"**{r.over_lora:.2f}**",
        f"{r.quartiles[0]:.2f} .. {r.quartiles[1]:.2f}",
        "" if r.target is None else f"{r.target:.2f}",
        f"{r.memory_over_lora:.2f}",
        other("peft"),
        other("lycoris"),
    )
    return "| " + " | ".join(cells) + " |"


def each_result(names: Sequence[str], base: Base, batch: int, rounds: int) -> Iterator[Result]:
    """Measure the cases in turn."""
    batches, cases = examples(base, batch, 8), _cases()
    for name in names:
        torch.manual_seed(0)
        yield measure(name, cases[name], base, batches, rounds)
        gc.collect()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=cast(str, __doc__).splitlines()[0])
    parser.add_argument("--methods", default="all", help=f"of {', '.join(_cases())}")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--base", default="toybox", help=f"toybox, a folder, a hub id, or {STAND_IN}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # LyCORIS tells the shape of every layer
    names = list(_cases()) if args.methods == "all" else args.methods.split(",")
    missing = TABLE.keys() - {case.kind for case in _cases().values()}
    if missing or set(names) - _cases().keys():
        parser.error(f"no case for {', '.join(sorted(missing) or sorted(set(names) - _cases().keys()))}")
    try:
        base = get_base(args.base, "cpu")
    except VgmError as error:
        parser.error(str(error))
    threads = f"{torch.get_num_threads()} thread(s), torch {torch.__version__}"
    print(f"base {args.base}, batch {args.batch}, {args.rounds} rounds, {threads}\n\n{HEAD}", flush=True)
    results: list[Result] = []
    for result in each_result(names, base, args.batch, args.rounds):
        results.append(result)
        print(row(result), flush=True)
    if args.json:
        told = {"base": args.base, "batch": args.batch, "rounds": args.rounds, "machine": threads}
        args.json.write_text(json.dumps({**told, "results": [asdict(r) for r in results]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
