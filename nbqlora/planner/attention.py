"""Which attention a fused layer runs, as far as the card, the dtype and the family say it; and what that holds.

The engine chooses again when the model is loaded, because a torch can lack an operator and a window is a layer's own:
the plan knows neither. In words the reasons are the engine's; a test compares them.

Bytes are those of the operators' sources (torch 2.13), beside q, k, v, the result and the three gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nbqlora.core.families import Family
from nbqlora.core.specs import DeviceSpec
from nbqlora.core.units import MIB

# What a backward may take for dq in fp32, as the engine limits it.
WORKSPACE_BYTES = 256 * MIB
# A kernel's tile of tokens: flash holds one more of dq for each document.
FLASH_TILE = 128
# Capability on which cuDNN is faster than flash for rows of one length without a window.
CUDNN_IS_FASTER = (9, 0)


class Kernel(Enum):
    """What computes attention in a fused layer."""

    FLASH = "flash"
    CUDNN = "cudnn"
    EFFICIENT = "efficient"
    SDPA = "sdpa"
    MATH = "math"

    @property
    def keeps_log_sums(self) -> bool:
        """The backward is given the log-sum-exp of each token and head, and does not compute the forward again."""
        return self in CAPTURED


# Kernels that take documents' boundaries from the card, so that a step can be captured.
CAPTURED = (Kernel.FLASH, Kernel.CUDNN, Kernel.EFFICIENT)


def choose_kernel(family: Family, device: DeviceSpec, dtype: str, head_dim: int, *, dense: bool) -> tuple[Kernel, str]:
    """The kernel and, in the engine's words, what runs and why: ``flash, varlen: capability 8.0``.

    Args:
        dense: each row is one document.
    """
    if family.caps_scores:
        return Kernel.MATH, "written out, one document at a time: no kernel caps scores"
    if device.kind == "cpu":
        return Kernel.SDPA, "one causal SDPA a document: a CPU"
    capability = device.capability or (8, 0)
    card, varlen = "capability {}.{}".format(*capability), "" if dense else ", varlen"
    half = dtype in ("fp16", "bf16") and not head_dim % 8
    if dense and capability == CUDNN_IS_FASTER and half and head_dim <= 128:
        # Whether a layer of this family has a window stands in its config, which a plan does not see.
        layers = ", flash in layers with a window" if family.window else ""
        return Kernel.CUDNN, f"cuDNN{layers}: measured faster than flash on {card}"
    no_flash = _flash_lacks(capability, dtype, head_dim)
    if not no_flash:
        return Kernel.FLASH, f"flash{varlen}: {card}"
    no_efficient = _efficient_lacks(capability, dtype, head_dim)
    if not no_efficient:
        return Kernel.EFFICIENT, f"memory-efficient{varlen}, keys expanded: {no_flash}"
    return Kernel.SDPA, f"one causal SDPA a document: {no_flash}; {no_efficient}"


def _flash_lacks(capability: tuple[int, int], dtype: str, head_dim: int) -> str:
    if capability < (8, 0):
        return "flash needs capability 8.0"
    if dtype == "fp32":
        return "flash takes fp16 and bf16 only"
    return f"flash takes heads of at most 256 in steps of 8, not {head_dim}" if head_dim > 256 or head_dim % 8 else ""


def _efficient_lacks(capability: tuple[int, int], dtype: str, head_dim: int) -> str:
    if dtype == "bf16" and capability < (8, 0):
        return "memory-efficient in bf16 needs capability 8.0"
    return f"memory-efficient takes heads in steps of 8, not {head_dim}" if head_dim % 8 else ""


@dataclass(frozen=True, kw_only=True)
class Attended:
    """What one attention works on.

    Args:
        q, kv: columns of q, and of k or v.
        tokens: of the micro-batch.
        documents: in it, with those of no tokens that fill a captured batch up.
        longest: tokens of the longest document.
        dense: each row is one document.
        window: layers may have a sliding one.
        on_card: False where SDPA is a CPU's.
        c: bytes of the dtype.
    """

    kernel: Kernel
    q: int
    kv: int
    head_dim: int
    tokens: int
    documents: int
    longest: int
    dense: bool
    window: bool
    on_card: bool
    c: int

    @property
    def heads(self) -> int:
        """Heads of q."""
        return self.q // self.head_dim

    @property
    def saved_bytes(self) -> int:
        """What the backward needs beside q, k, v and the result, for all tokens."""
        if not self.kernel.keeps_log_sums:
            return 0
        if self.kernel is Kernel.EFFICIENT and self.dense:
            return 4 * self.heads * self.documents * _up(self.longest, 32)
        return 4 * self.heads * self.tokens

    @property
    def forward_bytes(self) -> int:
        """Most that exists at once while the result, which is not counted, is computed."""
        if self.kernel in (Kernel.FLASH, Kernel.CUDNN):
            return 0
        if self.kernel is Kernel.EFFICIENT:
            return self._expanded(self.tokens) + self._placed()
        n, before = self._at_once()
        if self.writes_scores:
            return self._expanded(n) + self.q * self.c * n + 12 * self.heads * n * n
        return self._expanded(n) + (self.q * self.c + 4 * self.heads) * n + self.q * self.c * before + self._mask()

    @property
    def backward_bytes(self) -> int:
        """Most that exists at once while the gradients of q, k and v, which are not counted, are computed."""
        if self.kernel in (Kernel.FLASH, Kernel.CUDNN):
            return self._flash_backward()
        if self.kernel is Kernel.EFFICIENT:
            return self._efficient_backward()
        n, before = self._at_once()
        parts = (self.q + 2 * self.kv) * self.c * before
        if self.writes_scores:
            # Scaled q, the result, v's gradient; tanh and softmax, a gradient that comes and one that goes, in fp32.
            return parts + self._expanded(n) // 2 + 3 * self.q * self.c * n + (16 * self.heads + 1) * n * n
        # The result once more with its log-sums, and three gradients as wide as q.
        return parts + self._expanded(n) + (4 * self.q * self.c + 4 * self.heads) * n + self._mask()

    @property
    def groups(self) -> int:
        """Groups of heads that the backward takes one after the other."""
        return -(-self._kv_heads // self._kv_heads_at_once) if self.kernel in CAPTURED else 1

    @property
    def writes_scores(self) -> bool:
        """Scores of a document exist as a matrix; a card's SDPA, which runs where no kernel serves, is taken to."""
        return self.kernel is Kernel.MATH or (self.kernel is Kernel.SDPA and self.on_card)

    def _expanded(self, tokens: int) -> int:
        """Keys and values repeated for the heads that share them."""
        return 2 * self.q * self.c * tokens if self.kv < self.q else 0

    def _mask(self) -> int:
        """Which keys a token sees, as bool and in the dtype."""
        return (1 + self.c) * self.longest**2 if self.window else 0

    def _at_once(self) -> tuple[int, int]:
        """Tokens of one call, and of the call before, whose results are still there.

        A call is a document; rows of one length go together where no scores are written out.
        """
        if self.dense and not self.writes_scores:
            return self.tokens, 0
        return self.longest, min(self.longest, self.tokens - self.longest)

    def _placed(self) -> int:
        """Log-sums where the memory-efficient operator has them."""
        return 4 * self.heads * self.documents * _up(self.longest, 32)

    def _flash_backward(self) -> int:
        """Gradient of q in fp32, sums, and gradients of expanded keys and values; cuDNN is taken to need as much.

        In groups of heads all that for one group, with its three gradients; flash copies the group's part of the result
        and of its gradient (H200, 32,768 tokens in two groups: 962 MiB, 706 without these).
        """
        at_once, n_heads = self._kv_heads_at_once, self._kv_heads
        log_sums = 4 * self.heads * self._padded_tokens
        around = at_once * self._kv_head_workspace + (log_sums + self._expanded(self.tokens)) * at_once // n_heads
        if self.groups == 1:
            return around
        copied = 2 * self.q if self.kernel is Kernel.FLASH else 0
        return around + (self.q + 2 * self.kv + copied) * self.c * self.tokens * at_once // n_heads

    def _efficient_backward(self) -> int:
        """Expanded keys and values, their gradients, and dq in fp32 at each document's longest length.

        In groups of heads all that exists for one group, with its dq and copies of its result and of the result's
        gradient (H200, 32,768 tokens in two groups: 1,154 MiB). In one, the gradients of k and v are made when the
        operator is done with these. One head of k is not repeated: its copies lie in one place (H200, 4,096 tokens).
        """
        at_once, shared = self._kv_heads_at_once, self.kv < self.q
        around = at_once * self._kv_head_workspace + 2 * self._placed()
        if self.groups == 1:
            return 2 * self._expanded(self.tokens) + around - (2 * self.kv * self.c * self.tokens if shared else 0)
        share = self.q * self.c * self.tokens * at_once // self._kv_heads
        return (7 if shared and at_once > 1 else 5) * share + around

    @property
    def _kv_heads(self) -> int:
        return self.kv // self.head_dim

    @property
    def _kv_head_workspace(self) -> int:
        """Of dq in fp32, for the heads that share one of k's."""
        if self.kernel is Kernel.EFFICIENT:
            return 4 * self.documents * self.longest * self.q // self._kv_heads
        return 4 * self.heads // self._kv_heads * _up(self.head_dim, 32) * self._padded_tokens

    @property
    def _padded_tokens(self) -> int:
        """As flash holds them: a tile more for each document."""
        return self.tokens + (0 if self.dense else FLASH_TILE * self.documents)

    @property
    def _kv_heads_at_once(self) -> int:
        """As many as the engine's limit allows."""
        of_one = self._kv_head_workspace
        if self.kernel is not Kernel.EFFICIENT:  # the engine does not round a head up
            of_one = of_one // _up(self.head_dim, 32) * self.head_dim
        return min(self._kv_heads, max(1, WORKSPACE_BYTES // of_one))


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
