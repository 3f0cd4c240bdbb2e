"""Causal language models: windows of tokens, each token predicted from the ones before it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moqa.data import (
    Data,
    Source,
    Windows,
    as_distributions,
    as_text,
    cut_windows,
    split_held_out,
)
from moqa.errors import MoqaError, one_line
from moqa.tasks.configuration import CONFIG, read_configuration
from moqa.tasks.names import depth
from moqa.tasks.task import Samples, Task, paths_in, used_through

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """Tokenizer of a model folder.

    >>> load_tokenizer("reference/model").vocab_size
    8192

    Raises:
        MoqaError: if the folder has none.
    """
    from transformers import AutoTokenizer

    try:
        # transformers would read config.json itself, with whatever it says
        config = read_configuration(Path(folder)) if (Path(folder) / CONFIG).is_file() else None
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        tokenizer.decode(tokenizer(" Probe 1").input_ids)  # some settings only fail when they are used
        return tokenizer
    except Exception as error:  # the tokenizers library raises bare Exceptions, transformers many kinds
        raise MoqaError(f"{folder} has no tokenizer that transformers can read", one_line(error)) from None


class CausalLM(Task):
    """See `Task`."""

    name, kind = "causal_lm", "causal language model"
    batch_size, batch_dims = 1024, 2
    predicts_each, writes_samples = True, True
    used_by = used_through("AutoModelForCausalLM", "`moqa serve FOLDER_OR_ID` answers OpenAI-style requests")

    def accepts(self, config: "PretrainedConfig") -> bool:
        """See `Task`."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or _is_wrapper(config)

    def auto_class(self, config: "PretrainedConfig") -> Any:
        """That of a model of text; if `architectures` names one that also sees or hears, its class, with all parts."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

        if _is_wrapper(config):
            whole = AutoModelForMultimodalLM._model_mapping[type(config)].__name__
            if whole in (config.architectures or ()) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                return AutoModelForMultimodalLM
        return AutoModelForCausalLM

    def blocks(self, model: nn.Module) -> list[str]:
        """Its decoder layers."""
        get_decoder: Any = getattr(model, "get_decoder", None)
        decoder = get_decoder() if get_decoder else model
        for owner in (decoder, getattr(decoder, "model", None)):
            layers = getattr(owner, "layers", None)
            if isinstance(layers, nn.ModuleList) and len(layers):
                return paths_in(model, layers)
        children = ", ".join(name for name, _ in decoder.named_children())
        raise MoqaError(f"{type(model).__name__} has no decoder layers", f"looked for `layers` among {children}")

    def ends(self, model: "PreTrainedModel") -> list[Any]:
        """The embedding, and the head if there is one."""
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        return [end for end in ends if end is not None]

    def depth(self, config: "PretrainedConfig") -> int:
        """See `Task`."""
        return depth(config)

    def probe(self, model: nn.Module) -> Tensor:  # noqa: ARG002
        """Two tokens."""
        return torch.zeros(1, 2, dtype=torch.long)

    def call(self, model: nn.Module, batch: Tensor) -> Tensor:
        """[batch, context] token ids -> [batch, context, vocabulary]."""
        return model(batch, use_cache=False).logits

    def scored(self, logits: Tensor) -> Tensor:
        """Logits of all tokens of a window but the last, whose next token is not in the window."""
        return logits[:, :-1].flatten(0, 1)

    def targets(self, samples: Samples) -> Iterator[Tensor]:
        """The next tokens."""
        return (batch[:, 1:].reshape(-1) for batch in self.batches(samples.inputs))

    def processor(self, folder: str | Path) -> Any:
        """See `Task`."""
        return load_tokenizer(folder)

    def sources(self, data: Data, reader: Any) -> list[Source]:
        """Distributions of text, see `moqa.data.read_distribution`."""
        return list(as_distributions(data, reader))

    def split(self, source: Source) -> tuple[Source, Source]:
        """See `moqa.data.split_held_out`."""
        return split_held_out(as_text(source))

    def context(self, context: int) -> int:
        """Predictions of a window: one per token."""
        return context

    def cut(self, source: Source, reader: Any, context: int, count: int | None = None, seed: int = 0) -> Windows:
        """See `moqa.data.cut_windows`."""
        return cut_windows(as_text(source), reader, context, count, seed)


def _is_wrapper(config: "PretrainedConfig") -> bool:
    """Whether a configuration is of a model of text with parts that see or hear, which reads text alone as well."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

    whole = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and "text_config" in config.sub_configs
    return whole and not config.is_encoder_decoder
