"""The pool: the folder that training writes and that everything after reads. The contract is in checkpoints/README.md.

    <pool>/<task>/examples/<split>-<fingerprint>.npz   ids and, where known, labels; once per split
    <pool>/<task>/<member>/                            weights, logits and, written last, member.json

Only numpy and safetensors are imported here, and nothing is ever pickled. Three rooms, each standing on the one before:
``contract`` (names, records, examples), ``swap`` (writing, locking, mending) and ``reading``. From outside it is one
module, and this is its door.
"""

from lora_ensemble.pool.contract import (
    ADAPTER,
    ADAPTER_CONFIG,
    DISTILLED,
    EPOCHS,
    EXAMPLES,
    FULL,
    FULL_CONFIG,
    RECORD,
    Examples,
    MemberRecord,
    check_name,
    checksum,
    examples_fingerprint,
    logits_file,
    member_folder,
    read_examples,
    write_examples,
)
from lora_ensemble.pool.reading import (
    TaskPool,
    map_array,
    read_array,
    read_record,
    read_records,
    read_tensors,
    task_names,
)
from lora_ensemble.pool.swap import NewMember, can_lock, sole_sweep, write_member, write_members

__all__ = [
    "ADAPTER",
    "ADAPTER_CONFIG",
    "DISTILLED",
    "EPOCHS",
    "EXAMPLES",
    "FULL",
    "FULL_CONFIG",
    "RECORD",
    "Examples",
    "MemberRecord",
    "NewMember",
    "TaskPool",
    "can_lock",
    "check_name",
    "checksum",
    "examples_fingerprint",
    "logits_file",
    "map_array",
    "member_folder",
    "read_array",
    "read_examples",
    "read_record",
    "read_records",
    "read_tensors",
    "sole_sweep",
    "task_names",
    "write_examples",
    "write_member",
    "write_members",
]
