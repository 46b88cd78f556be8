"""The text stack of a transformers model: the config that describes its decoder layers, and the
place of their list.

A model of images, audio or any kinds of input holds a decoder of text beside its towers. Its sizes
are those of a config inside its own, `config.get_text_config(decoder=True)`. Everything here reads
that config; for a model of text alone it is the model's own.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .files import DEPTHS

LAYERS_NAMES = ("layers", "h", "blocks")


def text_config(config: Any) -> Any:
    """The config of the decoder of text: one inside a composite config, or the config itself."""
    try:
        text = config.get_text_config(decoder=True)
    except (AttributeError, ValueError):  # several are named, or the class defines it otherwise
        return config
    # of an encoder-decoder, transformers returns a copy that renames the decoder's fields
    return config if getattr(config, "is_encoder_decoder", False) else text


def has_towers(hf: Any) -> bool:
    """Whether a model takes other inputs besides text. fastprune runs only the text."""
    return text_config(hf.config) is not hf.config


def failure_of(hf: Any, error: Exception) -> str:
    """A line with the reason why a model's own code failed on tokens."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    if has_towers(hf):
        return f"it does not run on text alone ({kind}: {line})"
    return f"running its layers one by one failed ({kind}: {line})"


def with_text_config(owned: Any, text: Any) -> Any:
    """A config with another decoder of text: `text` itself, or a copy of the composite around
    it."""
    old = text_config(owned)
    return text if old is owned else _replaced(owned, old, text)


def _replaced(owned: Any, old: Any, new: Any) -> Any:
    for name in getattr(owned, "sub_configs", None) or {}:
        inner = getattr(owned, name, None)
        result = new if inner is old else inner and _replaced(inner, old, new)
        if result is not None and result is not inner:
            composite = copy.copy(owned)
            setattr(composite, name, result)
            return composite
    return owned


def depths(config: Any) -> dict[str, int]:
    """The numbers of layers that a config states, by name. Some families state two, of layers and
    of the caches that these fill."""
    own = vars(config)
    stated = {name: own[name] for name in DEPTHS if type(own.get(name)) is int}
    depth = getattr(config, "num_hidden_layers", None)  # under any name of the family's
    return (
        stated
        if "num_hidden_layers" in stated or depth is None
        else {
            "num_hidden_layers": depth,
            **stated,
        }
    )


def layer_paths(hf: nn.Module) -> list[tuple[str, ...]]:
    """Attribute paths from a transformers model to possible lists of decoder layers.

    A tower's list may have the same name and length as the decoder's; the config of the module
    that holds it tells them apart.
    """
    text = text_config(hf.config)
    lengths = set(depths(text).values())
    paths = [
        tuple(name.split("."))
        for name, module in hf.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) in lengths
        and name.split(".")[-1] in LAYERS_NAMES
    ]
    if text is hf.config:
        return paths
    kind = type(text)
    return [path for path in paths if type(config_above(hf, path)) is kind]


def config_above(hf: nn.Module, path: tuple[str, ...]) -> Any:
    """The config of the innermost module above a list of layers that has one."""
    module, config = hf, None
    for name in path:
        config = getattr(module, "config", None) or config
        module = getattr(module, name)
    return config


def towers(hf: nn.Module) -> tuple[str, ...]:
    """Names of the modules besides the decoder of text and its head: towers, and their adapters.

    Empty for a model of text alone, or one whose decoder is not found.
    """
    text, paths = text_config(hf.config), layer_paths(hf)
    if text is hf.config or len(paths) != 1:
        return ()
    path, above = paths[0], hf
    needed = {id(output_head(hf, path)), id(input_embeddings(hf))}
    result: list[str] = []
    for depth, name in enumerate(path):
        if depth and type(getattr(above, "config", None)) is type(text):
            return tuple(result)
        result += [
            ".".join((*path[:depth], child_name))
            for child_name, child in above.named_children()
            if child_name != name and not needed & {id(module) for module in child.modules()}
        ]
        above = getattr(above, name)
    return ()


def input_embeddings(hf: Any) -> Any:
    """The module that embeds tokens; None if the family does not name it."""
    try:
        return hf.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def output_head(hf: Any, path: tuple[str, ...]) -> Any:
    """The module that computes logits, of the model or of a module above its layers; or None."""
    module = hf
    for name in path:
        head = getattr(module, "get_output_embeddings", lambda: None)
        try:
            output = head()
        except (AttributeError, NotImplementedError):
            output = None
        if output is not None:
            return output
        module = getattr(module, name)
    return None


def auto_class(config: Any) -> Any:
    """The auto class of transformers that opens a checkpoint with this config.

    If the config names the class that wrote it, that class is opened.

    Raises:
        ValueError: The family has no model that gives logits of text.
    """
    import transformers

    classes: list[Any] = [
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForMultimodalLM,
    ]
    if text_config(config) is not config:  # try the class of the whole model first
        classes = [*classes[1:], classes[0]]
    remote = getattr(config, "auto_map", None) or {}
    for chosen in classes:
        if chosen.__name__ in remote:
            return chosen
    wrote = getattr(config, "architectures", None) or []
    owning = [chosen for chosen in classes if type(config) in chosen._model_mapping]
    for chosen in owning:
        if chosen._model_mapping[type(config)].__name__ in wrote:
            return chosen
    if not owning:
        raise ValueError(
            f"the family {config.model_type!r} has no model in transformers "
            f"{transformers.__version__} that continues text"
        )
    return owning[0]
