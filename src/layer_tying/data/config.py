"""The data and how they are cut into batches, as settings. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from layer_tying.data.glue import TASKS
from layer_tying.settings import check_at_least, check_types

if TYPE_CHECKING:
    TaskName = str
else:  # so that the command lists the names
    TaskName = Literal[tuple(TASKS)]


@dataclass(frozen=True)
class DataConfig:
    """The data.

    Raises:
        InputError: if a value is out of its range.
    """

    dataset: str = ""
    """a data set's name, khop:K, hub:OWNER/NAME, or the path of a file or folder (default: pydocs;
    vit: digits)"""
    data_dir: str | None = None
    """where local data sets lie (else $LAYER_TYING_DATA)"""
    tokenizer: str = "bytes"
    """bytes, bpe:N (learned), gpt2, bert-base-uncased, or a path"""
    objective: Literal["masked", "causal"] = "masked"
    """what BERT learns to predict"""
    bptt: int = 128
    """sequence length in tokens"""
    batch_size: int = 8
    """sequences in a batch, over all processes"""
    eval_batch_size: int = 32
    """sequences in an evaluation batch"""
    task: TaskName | None = None
    """the GLUE task to fine-tune for"""

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, ("bptt", "batch_size", "eval_batch_size"))
