"""Several cards: each has a share of a step's rows, and the adapters' gradients are added once a step.

Each has the whole model too, as long as that fits (``shards`` says what else there is). So memory is that of one card
with fewer rows, and what is sent does not grow with the rows: 4 bytes a LoRA parameter, of which a ring all-reduce
sends each card's share almost twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.plan import Decision, Plan
from nbqlora.core.specs import BatchLayout, DataStats, DeviceSpec, ModelSpec
from nbqlora.core.units import format_bytes, format_minutes
from nbqlora.planner.link import link_rate
from nbqlora.planner.standing import adapter_params


@dataclass(frozen=True, kw_only=True)
class Cards:
    """What trains together.

    Args:
        per_node: cards of a machine.
        n_nodes: machines.
    """

    per_node: int = 1
    n_nodes: int = 1

    @property
    def n(self) -> int:
        """All of them."""
        return self.per_node * self.n_nodes


def cards_asked(config: FinetuneConfig, device: DeviceSpec, n_nodes: int = 1) -> Cards:
    """The cards of ``gpus``, on each of so many machines like this one."""
    per_node = device.n_devices if config.gpus == "all" else config.gpus
    return Cards(per_node=per_node if isinstance(per_node, int) else 1, n_nodes=n_nodes)


def shared(device: DeviceSpec, cards: Cards) -> DeviceSpec:
    """One card's share of its machine: host memory is for all processes; on a CPU that is all there is.

    How fast the link is, measured or assumed, is written down too.
    """
    if cards.n == 1:
        return device
    free = device.free_bytes // cards.per_node if device.kind == "cpu" else device.free_bytes
    host, link = device.host_free_bytes // cards.per_node, link_rate(device, cards.n_nodes)[0]
    return replace(device, free_bytes=free, host_free_bytes=host, link_bytes_per_second=link)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a card sends in a step.

    Args:
        n_bytes: of gradients.
        seconds: what that takes.
        link: over what, in words.
    """

    n_bytes: int = 0
    seconds: float = 0.0
    link: str = ""


def sent(config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, cards: Cards) -> Sent:
    """The all-reduce of the adapters' gradients."""
    if cards.n == 1:
        return Sent()
    rate, link = link_rate(device, cards.n_nodes)
    n_bytes = int(2 * (cards.n - 1) / cards.n * 4 * adapter_params(model, config))
    return Sent(n_bytes=n_bytes, seconds=n_bytes / rate, link=link)


def decision(device: DeviceSpec, data: DataStats, cards: Cards, step_rows: int, send: Sent) -> Decision:
    """What each takes of a step, and what they tell each other."""
    many = f"{cards.per_node} x {device.name}"
    if device.kind == "cpu":
        many = "one process" if cards.per_node == 1 else f"{cards.per_node} processes"
    value = many if cards.n_nodes == 1 else f"{cards.n_nodes} machines of {many}"
    word = "packs" if data.layout is BatchLayout.PACKED else "rows"
    least, more = divmod(step_rows, cards.n)
    each = f"{least} of a step's {step_rows} {word} on each"
    if more:
        each = f"{least} or {least + 1} of a step's {step_rows} {word} on each, so some wait"
    seconds = f"{send.seconds * 1e3:.3g} ms a step"
    return Decision(
        name="cards", value=value, because=f"{each}; {format_bytes(send.n_bytes)} sent, {seconds} ({send.link})"
    )


def idle(device: DeviceSpec, plan: Plan, other_seconds: float | None) -> Decision:
    """What the cards that would be idle would bring.

    Args:
        other_seconds: of a step with all of them; None where it is not known.
    """
    more = device.n_devices - 1
    names = f"{more} more {device.name} {'is' if more == 1 else 'are'} idle"
    brings = f"gpus = {device.n_devices} would use {'both' if more == 1 else 'all'}"
    if other_seconds and plan.step_seconds:
        took, would = (format_minutes(plan.total_steps * s) for s in (plan.step_seconds, other_seconds))
        brings = f"gpus = {device.n_devices} would take {would} instead of {took.removeprefix('about ')}"
    return Decision(name="cards", value=f"1 of {device.n_devices}", because=f"{names}; {brings}")
