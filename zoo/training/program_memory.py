"""What a compiled program needs of a device's memory."""

from __future__ import annotations

from typing import Any


def program_bytes(compiled: Any) -> int | None:
    """Bytes on one device while `compiled` runs: arguments, results and temporaries, what is donated counted once.

    None where the backend does not say.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return kept + analysis.temp_size_in_bytes
