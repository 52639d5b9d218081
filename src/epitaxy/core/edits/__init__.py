"""The five kinds of edit to a frozen model: Branch, Delta, Tokens, KV and Swap."""

from epitaxy.core.edits.branch import Branch
from epitaxy.core.edits.delta import Delta
from epitaxy.core.edits.edit import Edit
from epitaxy.core.edits.kv import DecoupledKV, JointKV
from epitaxy.core.edits.swap import Replace, Swap
from epitaxy.core.edits.tap import Tap
from epitaxy.core.edits.tokens import Tokens

__all__ = ["Branch", "DecoupledKV", "Delta", "Edit", "JointKV", "Replace", "Swap", "Tap", "Tokens"]
