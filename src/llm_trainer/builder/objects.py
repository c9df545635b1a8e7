"""The objects of one run, each made when it is first asked for. `trainers.building.Build` is what algorithms see of it."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_trainer.builder.model import bits_to_read, leave_out, make_model, prepare_bits, refuse_changes
from llm_trainer.builder.seeing import check_same_images, image_tags, make_image_format, make_processor, refuse_tags
from llm_trainer.builder.streams import make_streams, options_of_reading, paths_of
from llm_trainer.checkpoint import load_checkpoint, load_weights
from llm_trainer.config.adapters import LORA
from llm_trainer.config.env import environment
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.model import VLMConfig
from llm_trainer.config.registry import options_of
from llm_trainer.config.schema import DataLoaderConfig, TrainConfig
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.store import save_array
from llm_trainer.data.encode.templates import default_template, has_default_template, template_of
from llm_trainer.data.encode.tokenizer import TokenizerError, load_tokenizer
from llm_trainer.data.kinds import DataOptions, Kind
from llm_trainer.data.load import choose_kind
from llm_trainer.data.packing import PACKERS
from llm_trainer.data.stream import SampleStream
from llm_trainer.data.vision import ImageFormat
from llm_trainer.engine import dist
from llm_trainer.engine.choose import engine_name
from llm_trainer.engine.device import DTYPES, choose_precision, detect_device
from llm_trainer.engine.score import Scoring
from llm_trainer.engine.torch import TorchEngine
from llm_trainer.layout import (
    AS_IT_CAME,
    Layout,
    Packing,
    choose_layout,
    given_layout,
    is_open,
    made_flat,
    takes_flat,
)
from llm_trainer.models.adapters import adapt
from llm_trainer.models.attention import knows_branches, resolve_attention
from llm_trainer.models.build import build_model
from llm_trainer.models.experts import experts_of
from llm_trainer.models.frozen import freeze, frozen_copy
from llm_trainer.models.inside import model_context, transformers_model
from llm_trainer.models.overrides import check_steady, steady_context
from llm_trainer.models.packing import packing_of
from llm_trainer.models.pretrained import Kind as Found
from llm_trainer.models.pretrained import find_pretrained
from llm_trainer.models.quantized_loading import check_quantized
from llm_trainer.models.scored import ScoredModel
from llm_trainer.models.vocabulary import Pieces, extend_tokenizer
from llm_trainer.terminal import waiting

LAYOUT_KEY = "data_loader_config.packing: none"
# Options of the data that hold for whatever data: the others name files or columns, or say in which order files come.
OF_ANY_DATA = (
    *("data_loader_num_workers", "data_loader_pin_memory", "data_loader_shuffle", "micro_batch_tokens", "truncation"),
    *("bad_rows", "bad_images", "max_pixels", "image_columns", "max_left_out", "parse_special_tokens", "cache_dir"),
)


class Builder:
    """Makes what a configuration describes.

    Args:
        config: the whole run.
        trainer_class: the algorithm, a subclass of `BaseTrainer`.
        given: keywords that the caller passes himself; they are not made here.
    """

    def __init__(self, config: TrainConfig, trainer_class: Any, given: Mapping[str, Any] | None = None) -> None:
        self.config, self.trainer_class, self.given = config, trainer_class, given or {}
        self.section = options_of(config, trainer_class)
        # Models that see the rows beside the trained one, as far as they are known here.
        self.further_ledgers: list[Any] = []  # of data beside the training data
        self._others = [value for name, value in self.given.items() if name != "model" and isinstance(value, nn.Module)]

    # Where it computes.

    @cached_property
    def device(self) -> torch.device:
        return detect_device(self.config.run_config.device)

    @cached_property
    def engine(self) -> str:
        """The name of what executes the steps."""
        config = self.config
        return engine_name(
            config.run_config.engine,
            fsdp=config.fsdp_config is not None,
            deepspeed=config.ds_config is not None,
            without_deepspeed=config.run_config.without_deepspeed,
        )

    @cached_property
    def _precision(self) -> str:
        return choose_precision(self.config.run_config.precision, self.device)

    # Models.

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer, _ = self._extended_tokenizer
        wanted, image = self.config.model_config, ""
        if isinstance(wanted, VLMConfig):
            image = wanted.image_token
        is_ours = not tokenizer.chat_template or (image and has_default_template(tokenizer))
        if self.trainer_class.prompt_format == "chat" and is_ours:
            # It is saved with the model: whoever opens the folder then talks to it as it was trained, in parts too.
            tokenizer.chat_template = default_template(tokenizer, image)
        return tokenizer

    @cached_property
    def _extended_tokenizer(self) -> tuple[Any, Pieces]:
        """The tokenizer with the tokens and the template of the configuration, and what the tokens were before."""
        if self.config.tokenizer is None:
            raise ValueError(
                "tokenizer: none given; name a tokenizer folder, or set the environment variable TOKEN_DIR"
            )
        vocabulary = self.config.vocabulary_config
        source = self.config.tokenizer
        is_missing_model = source == self.config.model_config and not Path(source).exists()
        with waiting(f"loading the tokenizer of {source}", dist.is_main()):
            tokenizer = self.tokenizer_of(source, "model_config") if is_missing_model else load_tokenizer(source)
        special, wanted = vocabulary.add_special_tokens, self.config.model_config
        if isinstance(wanted, VLMConfig) and wanted.image_token not in tokenizer.get_vocab():
            special = [*special, wanted.image_token]
        pieces = extend_tokenizer(tokenizer, vocabulary.add_tokens, special)
        if vocabulary.chat_template is not None:
            tokenizer.chat_template = template_of(vocabulary.chat_template)
        return tokenizer, pieces

    @cached_property
    def processor(self) -> Any:
        """Of a vision-language model: the tokenizer, and what makes numbers of images; None: another model."""
        if "model" in self.given:
            return None
        return make_processor(self.config, self.policy, self.tokenizer)

    @cached_property
    def images(self) -> ImageFormat | None:
        """What an image is in tokens and in numbers; None: the model reads text, or its rows show no images."""
        if self.processor is None:
            refuse_tags(self.section)
            return None
        if not self.kind.columns_of_images:
            return None
        return make_image_format(self.config, self.section, self.policy, self.processor)

    def tokenizer_of(self, source: str, key: str) -> Any:
        try:
            return load_tokenizer(source)
        except TokenizerError as error:
            found, _, _ = str(error).partition("; expected")
            raise ConfigError(f"{key}: {found}; expected the folder of a model with its tokenizer") from error

    def check_images(self, source: str, key: str) -> None:
        if self.images is not None:
            check_same_images(self.images, source, self.tokenizer, key)

    def leave_out(self, model: nn.Module) -> None:
        leave_out(model, (), None)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return tuple(ChatFormat(self.tokenizer).stop_token_ids())

    @cached_property
    def policy(self) -> Any:
        adapters = self.config.adapter_config
        if "model" in self.given:
            refuse_changes(self.config)
            return self.given["model"]
        with waiting("building the model", dist.is_main()):
            model = self.trainer_class._model_from_config(self.config, self)
            if adapters is None:
                prepare_bits(model, self.config, self.engine)
                leave_out(model, self.config.freeze, self.section)
                return model
            if self.config.quantization_config is not None:
                check_quantized(model)
            torch.manual_seed(self.config.run_config.seed)  # whether the weights before were drawn or read
            vocabulary = self.config.vocabulary_config
            new_tokens = [*vocabulary.add_tokens, *vocabulary.add_special_tokens]
            return adapt(model, adapters, self.tokenizer.convert_tokens_to_ids(new_tokens))

    def model(self, source: str | None = None, in_half: bool = False) -> Any:
        if source is None:
            bits = self.config.quantization_config
            in_numbers = bits is None or bool(bits.of_whole_weights)
            sharded = self.engine == "fsdp" and dist.num_processes() > 1 and in_numbers
            adapters = self.config.adapter_config
            # Others are made of the weights, or of what these make of rows.
            may_be_empty = adapters is None or (adapters.kind == LORA and not adapters.needs_rows)
            shards_first = self.trainer_class.shards_first_weights and may_be_empty
            empty = sharded and shards_first and not dist.is_main()
            _, pieces = self._extended_tokenizer
            options = bits_to_read(self.config, self.engine, self.device, self._precision)
            return make_model(self.config, self.tokenizer, self.device, empty, pieces, options)
        attention = resolve_attention(self.config.run_config.attention, self.device)
        dtype = DTYPES[self._precision if in_half else "fp32"]
        self._others.append(build_model(source, attention=attention, dtype=dtype))
        return self._others[-1]

    def frozen(self, source: Any) -> nn.Module:
        if isinstance(source, str):
            found = find_pretrained(source, (Found.LANGUAGE_MODEL, Found.WEIGHTS), key="ref_model_checkpoint")
            if found.kind is Found.LANGUAGE_MODEL:
                self._compare_ids(Path(found.source), "ref_model_checkpoint")
                return freeze(self.model(str(found.source)))
            reference = frozen_copy(self.policy)
            load_checkpoint(found.source, model=reference)
            return reference
        reference = frozen_copy(self.policy)
        load_weights(reference, source, "ref_model_checkpoint")
        return reference

    def _compare_ids(self, folder: Path, key: str) -> None:
        """
        Raises:
            ConfigError: a model that is compared with the policy reads other tokens than it under the same ids.
        """
        if self.tokenizer is None or not (folder / "tokenizer_config.json").is_file():  # such as that of a run of ours
            return
        theirs = {number: token for token, number in self.tokenizer_of(str(folder), key).get_vocab().items()}
        for token, number in self.tokenizer.get_vocab().items():
            if theirs.get(number, token) != token:
                raise ConfigError(
                    f"{key}: {folder} has another tokenizer than the policy: id {number} is {token!r} here and "
                    f"{theirs[number]!r} there; expected a model of the policy's family"
                )

    # Data.

    @cached_property
    def kind(self) -> Kind:
        """What a row of the data is: the kind that the algorithm learns from, of several the one that the first file holds."""
        loader = self.config.data_loader_config
        options = DataOptions(**options_of_reading(loader))
        return choose_kind(self._wanted.rows, paths_of(self.config.file_dataset), options)

    @cached_property
    def _wanted(self) -> Any:
        return self.trainer_class._data_from_config(self.section)

    @cached_property
    def _streams(self) -> tuple[SampleStream, dict[str, SampleStream]]:
        options, chat = self.options()
        return make_streams(self.config, self.trainer_class, self.kind, self.layout, options, chat)

    @cached_property
    def block_size(self) -> int:
        context = model_context(self.policy)
        block_size: int | None = self.config.dataset_block_size or context
        if block_size is None:
            raise ValueError(
                f"dataset_block_size: none given, and a {type(self.policy).__name__} does not say how long its rows may be; "
                f"expected a number of tokens"
            )
        if context is not None and block_size > context:
            raise ValueError(f"dataset_block_size: got {block_size}, but the model's longest sequence is {context}")
        inner = transformers_model(self.policy)
        if inner is not None:
            check_steady(block_size, steady_context(inner.config), "dataset_block_size")
        return block_size

    @property
    def evaluation(self) -> dict[str, SampleStream]:
        """Validation data by name."""
        return self._streams[1]

    @property
    def layout(self) -> Layout:
        """How the rows of a micro-batch are laid out."""
        return self._packing[1]

    @property
    def streams(self) -> tuple[Any, ...]:
        train, evaluation = self._streams
        return train, *evaluation.values()

    def further(self, files: Any, wanted: Any, rows_per_step: int, block_size: int) -> SampleStream:
        config = copy(self.config)
        loader = config.data_loader_config
        kept = {name: getattr(loader, name) for name in OF_ANY_DATA}
        config.file_dataset, config.eval_dataset, config.data_loader_config = files, None, DataLoaderConfig(**kept)
        config.dataset_block_size = min(block_size, model_context(self.policy) or block_size)
        other = Builder(config, self.trainer_class, self.given)
        other.tokenizer, other.policy, other._others = self.tokenizer, self.policy, self._others
        other._wanted = wanted
        if loader.packing in other.kind.packings:
            config.data_loader_config.packing = loader.packing
        stream, _ = other._streams
        dataset: Any = stream.dataset
        self.further_ledgers += dataset.ledgers
        return replace(stream, rows_per_step=rows_per_step)

    def score(
        self,
        model: nn.Module,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        function: Callable[[Any], Mapping[str, Tensor]],
        cache: Path,
    ) -> np.ndarray:
        cache = cache.with_name(f"{cache.stem}-{self._precision}{cache.suffix}")  # runs of any precision share stores
        if not all(dist.gather_objects(cache.exists())):  # a node may have a disk of its own
            budget = self.config.data_loader_config.micro_batch_tokens
            tokens = budget if isinstance(budget, int) else None
            scoring = Scoring(TorchEngine(self.device, self._precision), model.to(self.device), tokens)
            columns = scoring(dataset, collate, function)
            if environment().local_rank == 0:
                numbers = np.stack([np.array(column) for column in columns.values()], axis=1)
                save_array(cache, numbers.shape, numbers.dtype, [numbers])
            dist.broadcast_object(None)  # nobody reads before it is written
        return np.load(cache)

    @cached_property
    def _packing(self) -> tuple[str, Layout]:
        """How rows are packed, and laid out in a micro-batch: as the user says, or as the models that see them allow.

        Raises:
            ValueError: the user says flat, and a model would score such rows otherwise.
        """
        # 1. what there is to choose
        wanted, packings = self.config.data_loader_config.packing, self.kind.packings
        is_chosen = is_open(wanted, packings)
        if wanted == "auto" and not is_chosen:
            # 'wrapped' cuts anywhere, also through images
            first = "bfd_split" if packings[0] == "wrapped" and self.images is not None else packings[0]
            return first, AS_IT_CAME
        is_flat = wanted in ("flat", *PACKERS)
        may_be_flat = takes_flat(self.trainer_class) and (is_chosen or is_flat)
        # 2. what the models make of it
        tried: list[Packing] = []
        if may_be_flat:
            if dist.is_main():  # elsewhere there may be no weights
                tried = self._tried()
            tried = dist.broadcast_object(tried)
        if not is_chosen:
            key = f"data_loader_config.packing: {wanted}"
            return wanted, given_layout(tried, key) if is_flat else AS_IT_CAME
        couples = experts_of(self.policy) is not None and self.config.loss_config.couples_rows
        of_class = made_flat(self.trainer_class)
        tried.append(of_class._replace(couples_rows=couples or self._wanted.couples_rows))
        layout = choose_layout(tried, may_be_flat, self.trainer_class.__name__, LAYOUT_KEY)
        return "none" if layout.counts_padding else "flat", layout

    def _tried(self) -> list[Packing]:
        """What each model that sees the rows makes of them laid flat, where it will train."""
        if self.engine in ("torch", "hf"):
            self.policy.to(self.device)
        packings = []
        with TorchEngine(self.device, self._precision).precision():
            packings.append(packing_of(self.policy, self.trainer_class.reader, self.device))
            for model in self._others:
                packings.append(packing_of(model, ScoredModel, self.device))
        return packings

    def options(self) -> tuple[DataOptions, ChatFormat]:
        """How files become rows, and conversations ids.

        Raises:
            ValueError: rows are to be longer than the model can read.
        """
        loader = self.config.data_loader_config
        wants_sharing = self.kind.may_share and self._wanted.share_prompts
        options = DataOptions(
            **options_of_reading(loader),
            block_size=self.block_size,
            packing=self._packing[0],
            truncation=loader.truncation,
            max_left_out=loader.max_left_out,
            image_columns=loader.image_columns,
            image_tags=image_tags(self.config, self.section),
            workers=loader.data_loader_num_workers,
            share_prompts=wants_sharing and knows_branches(self.policy.config, self.device),
        )
        parse = loader.parse_special_tokens
        chat = ChatFormat(self.tokenizer, parse_special_tokens=parse, images=self.images, **self._wanted.chat)
        return options, chat
