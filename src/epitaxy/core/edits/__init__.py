"""The five kinds of edit to a frozen model: Branch, Delta, Tokens, KV and Swap."""

from epitaxy.core.edits.branch import Branch, Scale
from epitaxy.core.edits.delta import Delta
from epitaxy.core.edits.edit import Edit
from epitaxy.core.edits.grid import Grid, GridTap, grid_at
from epitaxy.core.edits.head import PooledHead, Replace
from epitaxy.core.edits.insertion import Insertion, Order, Reads
from epitaxy.core.edits.kv import DecoupledKV, JointKV
from epitaxy.core.edits.swap import Swap
from epitaxy.core.edits.tap import Tap
from epitaxy.core.edits.tokens import Tokens

__all__ = [
    "Branch",
    "DecoupledKV",
    "Delta",
    "Edit",
    "Grid",
    "GridTap",
    "Insertion",
    "JointKV",
    "Order",
    "PooledHead",
    "Reads",
    "Replace",
    "Scale",
    "Swap",
    "Tap",
    "Tokens",
    "grid_at",
]
