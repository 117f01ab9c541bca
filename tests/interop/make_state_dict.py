"""Writes tests/interop/golden/pytorch_model.bin with torch: python -m tests.interop.make_state_dict, which needs the extra `peers`.

`test_torch_archive.py` says what must be read from it. torch numbers the archive by its content, so that the same version
writes the same bytes again.
"""

from __future__ import annotations

from pathlib import Path

import torch

GOLDEN = Path(__file__).parent / "golden" / "pytorch_model.bin"


def main() -> None:
    module = torch.nn.Linear(3, 2)
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    with torch.no_grad():
        module.weight.copy_(base[0].reshape(2, 3) / 4)
        module.bias.copy_(base[0, :2])
    state = module.state_dict()  # an OrderedDict with _metadata
    state["tied"] = state["weight"]
    state["parameter"] = module.bias
    state["transposed"], state["sliced"] = base.T, base[1:, ::2]
    state["scalar"], state["empty"] = torch.tensor(7), torch.zeros(0, 3)
    for dtype in (torch.bool, torch.uint16, torch.float16, torch.bfloat16):
        state[str(dtype)] = torch.tensor([0, 1], dtype=dtype)
    torch.save(state, GOLDEN)


if __name__ == "__main__":
    main()
