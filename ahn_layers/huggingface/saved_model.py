"""Loading a folder that ``save_pretrained`` of a retrofitted model wrote, through transformers' Auto classes.

Its ``config.json`` has a model type that transformers does not know; ``register`` says what it means. ``AutoConfig``
then makes a config of a subclass of the base's class, and every Auto class maps this subclass to a loader: it lets the
same Auto class load the base, and puts the memory in.
"""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

MODEL_TYPE = "import ahn_layers"
"""The model type in ``config.json``: transformers shows it in its error when the library was not imported."""
ADVICE = "a model with a memory: run `import ahn_layers` first, and load it with an Auto class (AutoModelForCausalLM)"
"""What the error says when something else reads the folder."""
VARIANT = "ahn_layers"
"""The base weights are files of this variant, so that nothing takes them for a whole model."""

_BASE_TYPE, _RETROFIT, _NAMES_WEIGHTS = "base_model_type", "retrofit", "transformers_weights"
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def register() -> None:
    """Make the model type known to ``AutoConfig``, hence to all Auto classes."""
    AutoConfig.register(MODEL_TYPE, SavedConfig, exist_ok=True)


def variant_of(variant: str | None) -> str:
    """The variant of the base weights, for the variant that the user asked for."""
    return VARIANT if variant is None else f"{VARIANT}.{variant}"


def saved_config(base: dict[str, Any], retrofit: dict[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says: the base's config, but of our model type, and with no weights for any other class.

    Other config classes may read it (PEFT asks them for the vocabulary's size). A model class that does looks for the
    weights under the name that ``transformers_weights`` gives, and shows our advice in its error.
    """
    own = {_RETROFIT: retrofit, _BASE_TYPE: base["model_type"]}
    return _marked(base) | {"model_type": MODEL_TYPE, "ahn_layers": own}


def _marked(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose weights cannot be found, nor those of its parts."""
    parts = {name: u for name, u in config.items() if isinstance(u, dict) and "model_type" in u}
    return config | {name: _marked(u) for name, u in parts.items()} | {_NAMES_WEIGHTS: ADVICE}


def _unmarked(config: dict[str, Any]) -> dict[str, Any]:
    """Inverse of ``_marked``."""
    parts = {name: _unmarked(value) if isinstance(value, dict) else value for name, value in config.items()}
    return {name: value for name, value in parts.items() if name != _NAMES_WEIGHTS}


class SavedConfig(PreTrainedConfig):
    """Stands in the table of ``AutoConfig`` for saved models; what it makes is a config of the base's class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The base's config, with the description of the retrofit.

        Raises:
            ValueError: if the file is damaged, or the base's model type or the compressor is not known.
        """
        from ..adapter_files import check_known

        base = _unmarked(copy.deepcopy(config_dict))
        try:
            saved = base.pop("ahn_layers")
            retrofit, model_type = saved[_RETROFIT], saved[_BASE_TYPE]
        except (KeyError, TypeError) as error:
            raise ValueError(f"config.json of a model with a memory lacks {error}: save the model again.") from error
        base["model_type"] = model_type
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"the base model has the model type {model_type!r}, which this transformers does not know: import the "
                "module that registers it, or update transformers."
            )
        # here and not where the memory is loaded, since pipelines go on to other classes then
        check_known(retrofit, kwargs.get("name_or_path", "config.json"))
        found = CONFIG_MAPPING[model_type].from_dict(base, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        config.retrofit = retrofit
        config.transformers_weights = ADVICE  # no class but ours finds weights by this config
        plain: Any = type(config)
        config.__class__ = _described(plain)
        return found


def _restored(base: Any, state: dict[str, Any]) -> Any:
    config = base.__new__(base)
    config.__dict__.update(state)
    config.__class__ = _described(base)
    return config


@functools.cache
def _described(base: Any) -> Any:
    """A subclass of a config class, mapped to our loader by every Auto class that knows the base.

    It has the base's name, by which tokenizers and processors are found, but not its module: transformers 5.17 ignores
    a registration for classes of its own.
    """
    names = {
        "__module__": __name__,
        "__qualname__": base.__qualname__,
        "__reduce__": lambda self: (_restored, (base, self.__dict__.copy())),
    }
    ours = type(base.__name__, (base,), names)
    for auto in _auto_classes():
        if base in auto._model_mapping:
            loader = type(f"Retrofitted{auto.__name__}", (RetrofittedModel,), {"auto": auto})
            auto._model_mapping.register(ours, loader, exist_ok=True)
    return ours


def _auto_classes() -> Iterator[Any]:
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    assert modeling_auto  # which defines them
    waiting = list(_BaseAutoModelClass.__subclasses__())
    while waiting:
        auto = waiting.pop()
        waiting += auto.__subclasses__()
        if getattr(auto, "_model_mapping", None) is not None:
            yield auto


class RetrofittedModel:
    """What an Auto class takes for the model class of a saved model: makes the base and puts the memory in."""

    auto: ClassVar[Any]

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
        """As ``from_pretrained`` of the base's class, which the model is an instance of."""
        from ..adapter import load_checked

        description, base = config.retrofit, _base_config(config)
        given = kwargs.get("dtype") or kwargs.get("torch_dtype")
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        kwargs["variant"] = variant_of(kwargs.get("variant"))
        found = cls.auto.from_pretrained(source, *args, config=base, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        _retrofit(model, description)
        if description["compressor"] is not None or description.get("evictions"):
            folder = _adapter_folder(str(source), hub)
            load_checked(model, folder, {}, "weights", keep_dtype=given in (None, "auto"))
        model.eval()
        return found

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A new model of the base's class, retrofitted; its memory adds nothing yet."""
        return _retrofit(cls.auto.from_config(_base_config(config), **kwargs), config.retrofit)


def _retrofit(model: nn.Module, description: dict[str, Any]) -> nn.Module:
    from ..description import retrofit_as_described

    return retrofit_as_described(model, description)


def _base_config(config: Any) -> Any:
    """The base's own config, of its own class."""
    base = copy.copy(config)
    base.__class__ = type(config).__mro__[1]
    del base.retrofit, base.transformers_weights
    return base


def _adapter_folder(source: str, hub: dict[str, Any]) -> Path:
    """Where the adapter files are, downloaded if need be."""
    from transformers.utils.hub import cached_file

    from ..adapter_files import DESCRIPTION, WEIGHTS

    paths = [cached_file(source, name, **hub) for name in (WEIGHTS, DESCRIPTION)]
    return Path(paths[0]).parent
