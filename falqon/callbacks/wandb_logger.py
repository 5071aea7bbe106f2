"""Weights & Biases: online where there is an account, offline where there is none.

A run keeps its id in `<save_dir>/wandb/falqon_run_id.txt`, so that a resumed training continues
the same W&B run. Offline, each start writes a piece `wandb/offline-run-*` with that id;
`wandb sync --append <piece>` uploads them later.
"""

from __future__ import annotations

import netrc
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from falqon.errors import InputError

Mode = Literal["auto", "online", "offline", "disabled"]
ID_FILE = "falqon_run_id.txt"
# Values of WANDB_MODE, old spellings included, as the modes they mean.
_ENVIRONMENT_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_PUBLIC_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")


@dataclass(frozen=True)
class WandbSettings:
    """Where the metrics go on W&B.

    Attributes:
        project: W&B project.
        name: Name of the run; W&B invents one if None.
        group: Group of runs that belong together, such as one run a method.
        entity: User or team that owns the project; the account's default if None.
        tags: Tags of the run.
        mode: "online", "offline", "disabled", or "auto": online if an API key is at hand, in
            WANDB_API_KEY or a netrc file, else offline. WANDB_MODE may restrict this further
            (to offline or disabled) and decides for "auto".
    """

    project: str = "falqon"
    name: str | None = None
    group: str | None = None
    entity: str | None = None
    tags: list[str] | None = None
    mode: Mode = "auto"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(
                f"wandb mode {self.mode!r} does not exist. Use one of {', '.join(get_args(Mode))}."
            )
        if not self.project:
            raise InputError("wandb project is empty. Name one, or set mode to disabled.")


def make_wandb_logger(
    settings: WandbSettings, save_dir: str | Path, resume: bool
) -> WandbLogger | None:
    """Make the W&B logger of a run. Nothing starts, and no network is used, before the first log.

    Args:
        settings: What the user set.
        save_dir: Directory of the run; everything of W&B goes into its subdirectory `wandb`.
        resume: Continue the W&B run of this directory, if it has one. Otherwise a new one begins.

    Returns:
        The logger, or None if W&B is disabled by the settings or by WANDB_MODE.

    Raises:
        InputError: WANDB_MODE has an unknown value, wandb is not installed, or `save_dir` cannot
            be written.
    """
    mode = _decide(settings.mode)
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            "wandb is not installed. pip install wandb, or set the wandb mode to disabled."
        ) from error
    return _Logger(
        project=settings.project,
        name=settings.name,
        group=settings.group,
        entity=settings.entity,
        tags=settings.tags,
        save_dir=os.fspath(save_dir),
        version=_run_id(Path(save_dir), resume),
        # Not WandbLogger's own `offline`: it sets WANDB_MODE for the rest of the process.
        mode=mode,
        settings=wandb.Settings(silent=mode == "offline"),
    )


def is_disabled(settings: WandbSettings) -> bool:
    """Whether `make_wandb_logger` would give None.

    Raises:
        InputError: WANDB_MODE has an unknown value.
    """
    return _decide(settings.mode) == "disabled"


class _Logger(WandbLogger):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Lightning passes this one always, and wandb warns about it always.
        self._wandb_init.pop("anonymous", None)


def _decide(wanted: Mode) -> Mode:
    """The stricter of what the settings and WANDB_MODE say; "auto" is settled."""
    text = os.environ.get("WANDB_MODE", "").strip().lower()
    if text and text not in _ENVIRONMENT_MODES:
        raise InputError(
            f"WANDB_MODE={text!r} is not a mode. Use online, offline or disabled, or unset it."
        )
    environment = _ENVIRONMENT_MODES.get(text)
    if wanted == "auto":
        return environment or ("online" if _has_key() else "offline")
    order: tuple[Mode, ...] = ("online", "offline", "disabled")
    return max(wanted, environment or wanted, key=order.index)


def _has_key() -> bool:
    """Whether wandb would find credentials without asking. Reads the environment and netrc only."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(server).netloc,) if server else _PUBLIC_HOSTS
    given = os.environ.get("NETRC")
    home = Path.home()
    files = [Path(given).expanduser()] if given else [home / ".netrc", home / "_netrc"]
    for file in files:
        try:
            known = netrc.netrc(file)
        except (OSError, netrc.NetrcParseError):
            continue  # wandb could not use it either
        if any((entry := known.hosts.get(host)) and entry[2] for host in hosts):
            return True
    return False


def _run_id(save_dir: Path, resume: bool) -> str | None:
    """Id of the run in this directory. Only rank zero talks to W&B, so others have none."""
    if getattr(rank_zero_only, "rank", 0):
        return None
    file = save_dir / "wandb" / ID_FILE
    try:
        if resume and file.is_file() and (kept := file.read_text(encoding="utf-8").strip()):
            return kept
        new = secrets.token_hex(4)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(new + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{file} cannot be written: {error.strerror or error}. "
            "Set another run directory, or the wandb mode to disabled."
        ) from error
    return new
