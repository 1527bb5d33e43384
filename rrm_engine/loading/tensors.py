"""What a checkpoint's tensors must be: all there, of the model's shapes, numbers, enough rows for its tokenizer."""

from typing import Any

import torch

from rrm_engine.loading.checkpoint import Checkpoint, shortened

# What tools leave in front of every name, and where it comes from.
PREFIXES = {
    "_orig_mod.": "the model was compiled by torch.compile when it was saved: save model._orig_mod",
    "module.": "the model was wrapped in DataParallel when it was saved: save model.module",
    "_forward_module.": "the model was wrapped by a trainer when it was saved: save the wrapped one",
    "base_model.model.": "an adapter was wrapped around the model when it was saved: merge it, then save",
}


def refuse_foreign_tensors(checkpoint: Checkpoint, model: Any, report: dict[str, Any]) -> tuple[str, ...]:
    """Refuse a checkpoint whose tensors are not the model's.

    ``report`` is transformers' loading info: tied weights are not in it, nor what a family is known to leave out or
    to have left over. Whole modules at the top that the model lacks, such as value heads, are left alone; their names
    are returned.
    """
    missing, mismatched = set(report["missing_keys"]), report["mismatched_keys"]
    spare = {name for name in report["unexpected_keys"] if _is_spare(name, model)}
    unexpected = set(report["unexpected_keys"]) - spare
    for prefix, reason in PREFIXES.items():
        if missing and any(name.startswith(prefix) for name in report["unexpected_keys"]):
            raise checkpoint.refusal(f"the names of its tensors begin with {prefix}: {reason}")
    if mismatched:
        name, found, wanted = min((str(n), tuple(a), tuple(b)) for n, a, b in mismatched)
        more = f", and {len(mismatched) - 1} more do not fit" if len(mismatched) > 1 else ""
        raise checkpoint.refusal(
            f"{name} has the shape {_shape(found)} where config.json makes it {_shape(wanted)}{more}: the config is "
            f"not the one of these weights"
        )
    parts = [f"lacks {shortened(missing)}"] if missing else []
    parts += [f"has {shortened(unexpected)}, which {type(model).__name__} does not"] if unexpected else []
    if parts:
        raise checkpoint.refusal(
            f"the checkpoint {' and '.join(parts)}: it is incomplete, or its config is that of another model"
        )
    return tuple(sorted({_module(name) for name in spare}))


def _module(name: str) -> str:
    """The module at the top that a tensor belongs to, or its layer."""
    before, layers, after = name.partition(".layers.")
    return before + layers + after.split(".", 1)[0] if layers else name.split(".", 1)[0]


def _is_spare(name: str, model: Any) -> bool:
    """Whether a tensor belongs to a module that the model as a whole has nothing of: a head for another purpose, or
    layers after its last one that predict more tokens at once (``num_nextn_predict_layers``)."""
    own = {part for module, _ in model.named_children() for part in (module, model.base_model_prefix)}
    config = model.config.get_text_config()
    if (extra := getattr(config, "num_nextn_predict_layers", None)) and ".layers." in name:
        index = name.split(".layers.", 1)[1].split(".", 1)[0]
        return index.isdigit() and 0 <= int(index) - config.num_hidden_layers < extra
    return "." in name and name.split(".", 1)[0] not in own and not name.startswith(("layers.", "h.", "wte.", "embed"))


def refuse_partial_blocks(checkpoint: Checkpoint, settings: Any) -> None:
    """Refuse fp8 weights whose last blocks are partial ones: transformers spreads the scales evenly over a weight's
    rows and columns, whatever the size of a block is said to be."""
    values = settings if isinstance(settings, dict) or settings is None else settings.to_dict()
    block = (values or {}).get("weight_block_size")
    if not block:
        return
    shapes = checkpoint.shapes()
    for name, scales in shapes.items():
        weight = shapes.get(name.removesuffix("_scale_inv"))
        if name.endswith("_scale_inv") and weight and len(scales) == len(weight) >= 2:
            sizes = zip(weight[-2:], scales[-2:], block, strict=True)
            if any(count > 1 and size != count * width for size, count, width in sizes):
                raise checkpoint.refusal(
                    f"{name.removesuffix('_scale_inv')} of {_shape(weight)} is no multiple of the fp8 blocks of "
                    f"{_shape(tuple(block))} that config.json names, and transformers cannot unpack it: use the "
                    f"checkpoint that it was made from"
                )


def refuse_no_numbers(checkpoint: Checkpoint, model: Any) -> None:
    """Refuse weights that are NaN or infinite: every token they touch would be."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            raise checkpoint.refusal(f"{name} is still {tensor.dtype} after loading: the checkpoint lacks its scales")
        if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, tensor.detach().aminmax())):
            advice = "the checkpoint is damaged, or was saved after a training run that diverged"
            if tensor.dtype == torch.float16:
                advice += "; or float16 cannot hold them: try --dtype bfloat16"
            raise checkpoint.refusal(f"{name} holds values that are NaN or infinite: {advice}")


def refuse_missing_rows(checkpoint: Checkpoint, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with ids that the embedding has no row for. More rows than ids are common."""
    rows = model.get_input_embeddings().weight.shape[0]
    if beyond := {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}:
        named = shortened(f"{token!r} ({index})" for token, index in beyond.items())
        raise checkpoint.refusal(
            f"its tokenizer has tokens beyond the {rows:,} rows of the model's embedding: {named}; use the tokenizer "
            f"that the model was trained with, or resize its embedding"
        )


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes)) or "of a single number"
