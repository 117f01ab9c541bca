"""What a run scores at many lengths, as one PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any


def picture(report: Mapping[str, Any]) -> bytes | None:
    """The panels that a report of `eval.py --lengths` has numbers for, side by side; None where it has none.

    Perplexity (or else accuracy) against length, loss by the tokens before, attention resolution against length, and passkeys found by
    depth and length. A length that was refused is left out. The dashed line is the length of the training rows.
    """
    served = {int(n): entry for n, entry in report["lengths"].items() if "scores" in entry}
    panels: list[Callable] = []
    if served:
        panels.append(_perplexity if all("perplexity" in entry["scores"] for entry in served.values()) else _accuracy)
        if any("by_position" in entry for entry in served.values()):
            panels.append(_by_position)
        if _resolved(served):
            panels.append(_resolution)
    if any(isinstance(found, list) for found in report.get("passkey", {}).get("lengths", {}).values()):
        panels.append(_passkey)
    if not panels:
        return None
    from matplotlib.figure import Figure  # slow to import, and wanted only here

    figure = Figure(figsize=(4.5 * len(panels), 3.8), layout="constrained")
    for index, panel in enumerate(panels, start=1):
        panel(figure.add_subplot(1, len(panels), index), served, report)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    return drawn.getvalue()


def _perplexity(axes: Any, served: Mapping[int, Any], report: Mapping[str, Any]) -> None:
    _against_length(axes, served, report, "perplexity", {"non-overlapping rows": lambda e: e["scores"]["perplexity"]})
    slid = {n: entry["sliding"]["perplexity"] for n, entry in served.items() if "sliding" in entry}
    if slid:
        strides = {entry["sliding"]["stride"] for entry in served.values() if "sliding" in entry}
        axes.plot(list(slid), list(slid.values()), marker="o", markersize=3, label=f"sliding by {min(strides)}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False)


def _accuracy(axes: Any, served: Mapping[int, Any], report: Mapping[str, Any]) -> None:
    names = [name for name in next(iter(served.values()))["scores"] if name != "loss"]
    _against_length(axes, served, report, "score", {name: lambda e, name=name: e["scores"][name] for name in names})
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _resolution(axes: Any, served: Mapping[int, Any], report: Mapping[str, Any]) -> None:
    some = _resolved(served)
    _against_length(axes, some, report, "attention resolution", {"mean": lambda e: e["resolution"]["mean"]})
    for layer in range(len(next(iter(some.values()))["resolution"]["by_layer"])):
        values = [entry["resolution"]["by_layer"][layer] for entry in some.values()]
        axes.plot(list(some), values, linewidth=0.8, alpha=0.6, label=f"layer {layer}")
    axes.legend(frameon=False)


def _resolved(served: Mapping[int, Any]) -> dict[int, Any]:
    return {n: entry for n, entry in served.items() if "mean" in entry.get("resolution", {})}


def _against_length(
    axes: Any, served: Mapping[int, Any], report: Mapping[str, Any], what: str, curves: Mapping[str, Callable]
) -> None:
    for name, value in curves.items():
        axes.plot(list(served), [value(entry) for entry in served.values()], marker="o", markersize=3, label=name)
    axes.axvline(report["trained_at"], color="0.6", linestyle="--", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)


def _by_position(axes: Any, served: Mapping[int, Any], report: Mapping[str, Any]) -> None:
    for length, entry in served.items():
        buckets = entry.get("by_position", ())
        centres = [(bucket["from"] * bucket["to"]) ** 0.5 for bucket in buckets]
        axes.plot(centres, [bucket["loss"] for bucket in buckets], marker="o", markersize=2, label=f"rows of {length}")
    axes.axvline(report["trained_at"], color="0.6", linestyle="--", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens before, in the row")
    axes.set_ylabel("loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _passkey(axes: Any, served: Mapping[int, Any], report: Mapping[str, Any]) -> None:
    passkey = report["passkey"]
    found = {n: values for n, values in passkey["lengths"].items() if isinstance(values, list)}
    columns = [list(row) for row in zip(*found.values(), strict=True)]
    shown = axes.imshow(columns, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(found)), list(found))
    axes.set_yticks(range(len(passkey["depths"])), [f"{depth:.0%}" for depth in passkey["depths"]])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth of the key")
    axes.set_title(f"passkeys found, of {passkey['keys']}", fontsize=9)
    axes.figure.colorbar(shown, ax=axes)
