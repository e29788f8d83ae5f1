"""``python -m lora_ensemble.dicor`` is ``dicor``."""

import sys

from lora_ensemble.dicor.cli import main

if __name__ == "__main__":
    sys.exit(main())
