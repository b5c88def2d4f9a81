"""Weights in 8-bit floats, as some files have them to be small."""

from ldm.checkpoint.tensors import State


def widened(state: State) -> tuple[State, list[str]]:
    """Return the tensors with those of 8-bit floats as float16, which holds them exactly, and a note of it.

    torch computes with few of them, and on a CPU with none.
    """
    eight = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.itemsize == 1}
    if not eight:
        return state, []
    kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in eight.values()}))
    note = f"{len(eight)} weights are stored in 8 bits ({kinds}): they are read as float16, which holds them exactly"
    return state | {name: tensor.half() for name, tensor in eight.items()}, [note]
