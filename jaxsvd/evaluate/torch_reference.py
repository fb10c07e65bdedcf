"""What transformers, on torch, answers: a reference that shares no code with jaxsvd. Both are imported when asked."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxsvd.checkpoint.read import Checkpoint, CheckpointWeights
from jaxsvd.errors import ModelError, UsageError
from jaxsvd.kernels import Dense


def check() -> None:
    """Raises UsageError where torch or transformers is missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"the reference transformers needs torch and transformers ({error}): pip install torch, "
            "or take the reference jaxsvd, which needs neither"
        ) from None


def greedy(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    count: int,
    ends: Sequence[int],
    progress: Callable[[int], object],
) -> np.ndarray:
    """Float32 logits (batch, count, vocab) of the greedy text behind each prompt, one prompt at a time, on CPU.

    Those of the tokens `ends` are -inf.
    """
    import torch

    model = _model(checkpoint)
    logits = np.empty((len(prompts), count, checkpoint.config.vocab_size), np.float32)
    with torch.inference_mode():
        for row, prompt in zip(logits, prompts, strict=True):
            ids, past = torch.tensor([list(prompt)]), None
            for found in row:
                answer = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                found[:] = answer.logits[0, -1].numpy()
                found[ends] = -np.inf
                ids, past = torch.tensor([[int(found.argmax())]]), answer.past_key_values
                progress(1)
    return logits


def _model(checkpoint: Checkpoint) -> Any:
    """A torch model of a checkpoint, float32, its factors multiplied out."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own = ("model_type", "architectures", "torch_dtype", "dtype", "low_rank", "quantization_config", "auto_map")
    fields = {name: value for name, value in checkpoint.raw.items() if name not in own}
    config = AutoConfig.for_model(checkpoint.config.architecture, **fields)
    config.tie_word_embeddings = bool(checkpoint.config.tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    tensors = {name: torch.from_numpy(array) for name, array in dense_tensors(checkpoint).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ModelError(
            f"transformers' {type(model).__name__} has other tensors than {checkpoint.folder} "
            f"({', '.join([*unexpected, *missing][:3])}): take the reference jaxsvd"
        )
    model.tie_weights()
    return model


def dense_tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The float32 tensors of the dense model that a checkpoint stands for, by their HF names.

    Factors are multiplied out. Narrowed MLPs get their width back as zeros, which change nothing: silu(0)·0 = 0.
    """
    wide = checkpoint.config.intermediate_size
    weights = CheckpointWeights(checkpoint, np.float32)
    # The reader's arrays may be read-only views, and torch wants memory that is its own.
    tensors = {name: np.array(weights.array(name)) for name in checkpoint.arrays}
    for path in checkpoint.matrices:
        matrix, bias = weights.matrix(path, *checkpoint.shapes[path], False)
        w = matrix.w if isinstance(matrix, Dense) else matrix.u @ matrix.v
        narrow = path.endswith((".gate_proj", ".up_proj"))
        missing = (wide - w.shape[0] if path.endswith(".down_proj") else 0, wide - w.shape[1] if narrow else 0)
        tensors[f"{path}.weight"] = np.pad(w, [(0, missing[0]), (0, missing[1])]).T.copy()
        if bias is not None:
            tensors[f"{path}.bias"] = np.pad(bias, (0, missing[1]))
    return tensors
