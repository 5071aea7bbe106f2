"""Train, validate, test or ask a model: `python train.py fit --config configs/quickstart.yaml`."""

import datamodules  # noqa: F401  (its classes can be named in a configuration)
import lit_modules  # noqa: F401
from falqon.training import run

if __name__ == "__main__":
    run()
