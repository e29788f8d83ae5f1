"""``python -m lora_ensemble``."""

import sys

from lora_ensemble.main import main

sys.exit(main())
