"""What a method cannot do on a family, with the reason.  Everything else is promised.

Names are patterns.  ``how`` is what the matrix must see instead of the promise: the library refuses with one sentence
that contains ``says`` ("refused"), a fresh adapter changes the output ("differs"), or the bare base already fails
("base").  An exception that turns out to work fails the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from tests.contract.methods import Variant

How = Literal["refused", "differs", "base"]


@dataclass(frozen=True)
class Limit:
    """One declared exception."""

    methods: str
    families: str
    check: str
    reason: str
    says: str = ""
    how: How = "refused"

    def covers(self, method: str, family: str, check: str) -> bool:
        """Whether the cell is declared by this line."""
        return (
            check == self.check
            and any(fnmatchcase(method, pattern) for pattern in self.methods.split())
            and any(fnmatchcase(family, pattern) for pattern in self.families.split())
        )


DECLARED = (
    Limit(
        "lora_conv",
        "bert llama mistral gpt2 plain",
        "attaches",
        "the model has no convolution",
        says="no module of the kind 'conv'",
    ),
    Limit(
        "soft_moa*",
        "llama mistral gpt2",
        "attaches",
        "its slots are averages of all tokens, and a causal model may not look ahead",
        says="read all tokens, later ones too",
    ),
    Limit(
        "dense_moa_convpass",
        "llama mistral gpt2",
        "attaches",
        "its convolution reads the next token, and a causal model may not look ahead",
        says="reads the next token",
    ),
    Limit(
        "dense_moa_legacy",
        "swin",
        "attaches",
        "the published second addition needs an attention whose output has the feed-forward's shape, not windows",
        says="one result cannot be added to both",
    ),
    Limit(
        "prompt*",
        "swin",
        "attaches",
        "its blocks work on windows of a fixed grid, extra tokens have no window",
        says="takes no extra tokens",
    ),
    Limit(
        "prompt*",
        "sd15 sdxl",
        "attaches",
        "its sequences are pictures, and every token must come back to its place",
        says="takes no extra tokens",
    ),
    Limit(
        "prefix lora_prefix",
        "timm",
        "attaches",
        "its attention makes queries, keys and values by one matrix, and computes its softmax itself",
        says="takes no extra keys; use a gated prefix",
    ),
    Limit(
        "conformer* convpass* grid_conv",
        "llama mistral gpt2",
        "attaches",
        "a convolution over tokens would let them see later ones",
        says="see later ones",
    ),
    Limit(
        "convpass grid_conv",
        "swin",
        "attaches",
        "its blocks work on windows, and its patch grid shrinks from stage to stage",
        says="work on windows of a fixed grid",
    ),
    Limit(
        "convpass grid_conv",
        "bert sd15 sdxl",
        "attaches",
        "it has no patch grid that could be told",
        says="no convolution known to make its tokens",
    ),
    Limit(
        "bitfit lora_bitfit_head",
        "llama mistral",
        "attaches",
        "the model has no biases",
        says="no module of the kind 'bias'",
    ),
    Limit(
        "head head_labels head_pooled lora_bitfit_head",
        "sd15 sdxl",
        "attaches",
        "a denoiser has no task head",
        says="'head' matches no role",
    ),
    Limit(
        "head_pooled prompt_pooled",
        "llama mistral gpt2",
        "attaches",
        "a language model predicts a token at every position, a pooled head one output for the whole sequence",
        says="use a model for classification",
    ),
    Limit(
        "head_labels",
        "*",
        "identity",
        "a head of other labels starts from random values",
        how="differs",
    ),
    Limit(
        "head head_labels head_pooled prompt_pooled lora_bitfit_head",
        "*",
        "together",
        "two heads cannot both be the output layer",
        says="both replace",
    ),
    Limit(
        "head_labels",
        "*",
        "route_base",
        "rows with 5 outputs and rows of the base with another number make no tensor",
        says="outputs of different sizes",
    ),
    Limit(
        "head lora_bitfit_head",
        "gpt2",
        "merge",
        "its output layer shares its weight with the word embeddings",
        says="is shared with",
    ),
    Limit(
        "head_labels",
        "llama mistral gpt2",
        "merge",
        "the base's output layer has no bias to hold the trained one",
        says="has no bias",
    ),
    Limit(
        "prefix lora_prefix",
        "sd15 sdxl plain",
        "route_base",
        "a row without a prefix beside rows with one needs a mask, which this attention cannot take",
        says="different prefix lengths",
    ),
    Limit(
        "prompt*",
        "plain timm",
        "route_base",
        "a row without prompts beside rows with some needs a mask, which this model cannot take",
        says="different numbers of prompt tokens",
    ),
    Limit(
        "*",
        "wav2vec2",
        "pickling",
        "torch cannot pickle a model with parametrised modules; deepcopy works",
        how="base",
    ),
)


def declared(method: Variant, family: str, check: str) -> Limit | None:
    """The exception that covers a cell: a line of the table, or what the method class itself declares."""
    for line in DECLARED:
        if line.covers(method.name, family, check):
            return line
    if check in method.cannot:
        how: How = "differs" if check == "identity" else "refused"
        return Limit(method.name, family, check, method.cannot[check], how=how)
    return None
