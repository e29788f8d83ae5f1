#!/usr/bin/env bash
# Everything that waits for a GPU, nine minutes at most: bash benchmarks/gpu.sh --help
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Nothing is fetched: where a name is no folder and no installed package, that is said at once.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$here/..:$here${PYTHONPATH:+:$PYTHONPATH}"
# What was carried along with the encoder comes first.
for ((i = 1; i < $#; i++)); do
  if [ "${!i}" = --minilm ]; then
    next=$((i + 1))
    export PYTHONPATH="$(cd "${!next}" && pwd)/packages:$PYTHONPATH"
  fi
done
exec "${PYTHON:-$(command -v python3 || command -v python)}" -m gpu "$@"
