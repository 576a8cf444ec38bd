"""What are the records? Reading, shapes, chat templates, splits, duplicates, contamination, packing."""

from selectune.data.chat import Encoded, Encoder
from selectune.data.contamination import without_overlap
from selectune.data.packing import LikeLengths, pack, stack
from selectune.data.prepare import Prepared, hashes_of, input_hashes, prepare, read_pool, read_target
from selectune.data.records import Message, Record, records_from_file, records_to_file

__all__ = [
    "Encoded", "Encoder", "LikeLengths", "Message", "Prepared", "Record", "hashes_of", "input_hashes", "pack", "prepare", "read_pool",
    "read_target", "records_from_file", "records_to_file", "stack", "without_overlap",
]  # fmt: skip
