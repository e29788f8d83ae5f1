"""The pool: the folder that training writes and that everything after reads. The contract is in checkpoints/README.md.

    <pool>/<task>/examples/<split>-<fingerprint>.npz   ids and, where known, labels; once per split
    <pool>/<task>/<member>/                            weights, logits and, written last, member.json

Nothing is ever pickled. Three files, each standing on the one before: ``contract`` (names, records, examples), ``swap``
(writing, locking, mending) and ``reading``. From outside it is one module, and this is its door. Axes in all of it: N
examples of a split, C outputs of a head, E epochs.
"""

from lora_ensemble.pool.contract import (
    ADAPTER,
    ADAPTER_CONFIG,
    DISTILLED,
    EXAMPLES,
    FULL,
    FULL_CONFIG,
    RECORD,
    Examples,
    MemberRecord,
    check_name,
    checksum,
    epochs_file,
    examples_fingerprint,
    in_fold,
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

# Names of files; records and examples; writing; reading.
__all__ = ["ADAPTER", "ADAPTER_CONFIG", "DISTILLED", "EXAMPLES", "FULL", "FULL_CONFIG", "RECORD"]
__all__ += ["check_name", "checksum", "epochs_file", "in_fold", "logits_file", "member_folder"]
__all__ += ["Examples", "MemberRecord", "examples_fingerprint", "read_examples", "write_examples"]
__all__ += ["NewMember", "can_lock", "sole_sweep", "write_member", "write_members"]
__all__ += ["TaskPool", "map_array", "read_array", "read_record", "read_records", "read_tensors", "task_names"]
