"""Libraries that only some methods need, imported when such a method is made."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from falqon.errors import InputError


def torchao(module: str) -> Any:
    """A module of torchao, for methods that quantise with it.

    Raises:
        InputError: naming the extra, if torchao is not installed.
    """
    # On import it warns about extensions for other machines, which nothing here calls.
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        return importlib.import_module(f"torchao.{module}")
    except ImportError as error:
        raise InputError(
            f"this method quantises with torchao ({error}): pip install 'falqon[torchao]'."
        ) from None
    finally:
        logging.disable(before)
