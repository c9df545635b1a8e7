"""The objects of one run, each made when it is first asked for. `trainers.building.Build` is what algorithms see of it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_trainer.checkpoint import load_checkpoint, load_weights
from llm_trainer.config.adapters import LORA
from llm_trainer.config.algorithms import SFTConfig
from llm_trainer.config.env import environment
from llm_trainer.config.errors import ConfigError, counted, fields_of
from llm_trainer.config.options import Reading
from llm_trainer.config.registry import accumulation, options_of
from llm_trainer.config.schema import DataLoaderConfig, ModelConfig, TrainConfig, VLMConfig
from llm_trainer.data.cache import default_folder
from llm_trainer.data.duplicates import note_overlap
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.store import save_array
from llm_trainer.data.encode.templates import default_template, template_of
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions, Kind
from llm_trainer.data.load import choose_kind, load, open_stream
from llm_trainer.data.packing import PACKERS
from llm_trainer.data.provided import ProvidedImages
from llm_trainer.data.read.files import files_of
from llm_trainer.data.read.renaming import check_named_files
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
    takes_flat,
    takes_images,
)
from llm_trainer.models import qat
from llm_trainer.models.adapter_folder import load_start
from llm_trainer.models.adapters import adapt
from llm_trainer.models.attention import knows_branches, resolve_attention
from llm_trainer.models.build import build_model, set_stops
from llm_trainer.models.freezing import PROJECTOR_ALONE, freeze_parts
from llm_trainer.models.frozen import freeze, frozen_copy
from llm_trainer.models.inside import model_context, sees_images, transformers_model
from llm_trainer.models.overrides import check_steady, steady_context
from llm_trainer.models.packing import packing_of
from llm_trainer.models.pretrained import Kind as Found
from llm_trainer.models.pretrained import find_pretrained
from llm_trainer.models.quantized_loading import check_quantized, loading_options
from llm_trainer.models.scored import ScoredModel
from llm_trainer.models.vision import unreached
from llm_trainer.models.vision_build import processor_for, read_processor, side_of
from llm_trainer.models.vocabulary import Pieces, check_rows, extend_rows, extend_tokenizer, num_ids
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
        if self.trainer_class.prompt_format == "chat" and not tokenizer.chat_template:
            # It is saved with the model: whoever opens the folder then talks to it as it was trained.
            tokenizer.chat_template = default_template(tokenizer)
        return tokenizer

    @cached_property
    def _extended_tokenizer(self) -> tuple[Any, Pieces]:
        """The tokenizer with the tokens and the template of the configuration, and what the tokens were before."""
        if self.config.tokenizer is None:
            raise ValueError(
                "tokenizer: none given; name a tokenizer folder, or set the environment variable TOKEN_DIR"
            )
        vocabulary = self.config.vocabulary_config
        with waiting(f"loading the tokenizer of {self.config.tokenizer}", dist.is_main()):
            tokenizer = load_tokenizer(self.config.tokenizer)
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
        model, wanted = transformers_model(self.policy), self.config.model_config
        if "model" in self.given or model is None or not sees_images(model.config):
            return None
        if isinstance(wanted, VLMConfig):
            return processor_for(model.config, self.tokenizer, wanted.vision_path)
        source = find_pretrained(str(wanted), (Found.LANGUAGE_MODEL,), key="model_config").model_source
        return read_processor(source, self.tokenizer)

    @cached_property
    def images(self) -> ImageFormat | None:
        """What an image is in tokens and in numbers; None: the model reads text, or its rows show no images."""
        of_tags = self.section if isinstance(self.section, SFTConfig) else SFTConfig()
        if self.processor is None:
            if of_tags.image_tags_file_dataset is not None:
                raise ValueError(
                    "sft_config.image_tags_file_dataset: found a model that reads text; expected one that sees, a VLMConfig or "
                    "the folder of a vision-language model"
                )
            return None
        if not self.kind.columns_of_images:
            return None
        model = transformers_model(self.policy)
        assert model is not None
        patch = getattr(model.config.vision_config, "patch_size", None)
        if patch is not None:
            patch = side_of(patch)
        if of_tags.pixel_values_provider is not None:
            return ProvidedImages(self.processor, of_tags.pixel_values_provider, patch)
        return ImageFormat(self.processor, patch, self.config.data_loader_config.max_pixels)

    def _image_tags(self) -> dict[str, str]:
        """For each file of the training data the csv of its images."""
        if not isinstance(self.section, SFTConfig) or self.section.image_tags_file_dataset is None:
            return {}
        files, tags = _paths(self.config.file_dataset), _paths(self.section.image_tags_file_dataset)
        if len(files) != len(tags):
            raise ValueError(
                f"sft_config.image_tags_file_dataset: got {counted(len(tags), 'file')} for {counted(len(files), 'path')} of "
                "file_dataset, expected one each"
            )
        for file in files:
            if not Path(file).is_file():
                raise ValueError(
                    f"sft_config.image_tags_file_dataset: {file} in file_dataset is no single file; expected one for each csv"
                )
        return {str(Path(file)): csv for file, csv in zip(files, tags, strict=True)}

    def tokenizer_of(self, source: str) -> Any:
        return load_tokenizer(source)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return tuple(ChatFormat(self.tokenizer).stop_token_ids())

    @cached_property
    def policy(self) -> Any:
        adapters = self.config.adapter_config
        if "model" in self.given:
            _refuse_changes(self.config)
            return self.given["model"]
        with waiting("building the model", dist.is_main()):
            model = self.trainer_class._model_from_config(self.config, self)
            if adapters is None:
                self._prepare_bits(model)
                self._freeze(model)
                return model
            if self.config.quantization_config is not None:
                check_quantized(model)
            torch.manual_seed(self.config.run_config.seed)  # whether the weights before were drawn or read
            vocabulary = self.config.vocabulary_config
            new_tokens = [*vocabulary.add_tokens, *vocabulary.add_special_tokens]
            return adapt(model, adapters, self.tokenizer.convert_tokens_to_ids(new_tokens))

    def _prepare_bits(self, model: Any) -> None:
        """Have a model compute with weights as they will be rounded, if the configuration wants to."""
        wanted = self.config.quantization_config
        if wanted is None or wanted.qat is None:
            qat.forget(model)
            return
        if self.engine != "torch" or dist.num_processes() > 1:
            raise ConfigError(
                f"quantization_config.qat: got engine {self.engine} on {counted(dist.num_processes(), 'process')}, and it was "
                f"tried out on one process with engine torch only; expected that"
            )
        qat.prepare(model, wanted.qat)

    def _freeze(self, model: nn.Module) -> None:
        """Leave out of the training what the configuration says."""
        wanted = list(self.config.freeze)
        if isinstance(self.section, SFTConfig) and self.section.freeze_llm_model:
            wanted += PROJECTOR_ALONE
        if wanted:
            freeze_parts(model, wanted)
        inner = transformers_model(model)
        if inner is None or not sees_images(inner.config):
            return
        # What no loss reaches of a tower. Other processes may have no weights to try it out on.
        lost = list[str]()
        if dist.is_main():
            with contextlib.suppress(AttributeError, KeyError, RuntimeError, TypeError, ValueError):
                lost = unreached(model, with_images=True)  # of a family that nobody has tried it may not be known
        for name in dist.broadcast_object(lost):
            model.get_parameter(name).requires_grad_(False)

    def model(self, source: str | None = None, in_half: bool = False) -> Any:
        if source is None:
            sharded = self.engine == "fsdp" and dist.num_processes() > 1 and self.config.quantization_config is None
            adapters = self.config.adapter_config
            may_be_empty = adapters is None or adapters.kind == LORA  # others are made of the weights
            shards_first = self.trainer_class.shards_first_weights and may_be_empty
            empty = sharded and shards_first and not dist.is_main()
            _, pieces = self._extended_tokenizer
            return make_model(self.config, self.tokenizer, self.device, empty, pieces, self._loading)
        attention = resolve_attention(self.config.run_config.attention, self.device)
        dtype = DTYPES[self._precision if in_half else "fp32"]
        self._others.append(build_model(source, attention=attention, dtype=dtype))
        return self._others[-1]

    @property
    def _loading(self) -> dict[str, Any]:
        """How the weights of the model to train are read, beside plainly: keywords of `from_pretrained`."""
        wanted, source = self.config.quantization_config, self.config.model_config
        if wanted is None or wanted.qat is not None or not isinstance(source, str):
            return {}
        if wanted.bits == 8 and self.engine == "fsdp":
            raise ValueError(
                "quantization_config.bits: got 8, and FSDP shards numbers that are floats; expected bits: 4, or ZeRO (engine: "
                "deepspeed)"
            )
        found = find_pretrained(source, (Found.LANGUAGE_MODEL,), key="model_config")
        return loading_options(wanted, found.source, self.device, DTYPES[self._precision])

    def frozen(self, source: Any) -> nn.Module:
        if isinstance(source, str):
            found = find_pretrained(source, (Found.LANGUAGE_MODEL, Found.WEIGHTS), key="ref_model_checkpoint")
            if found.kind is Found.LANGUAGE_MODEL:
                return freeze(self.model(str(found.source)))
            reference = frozen_copy(self.policy)
            load_checkpoint(found.source, model=reference)
            return reference
        reference = frozen_copy(self.policy)
        load_weights(reference, source, "ref_model_checkpoint")
        return reference

    # Data.

    @cached_property
    def kind(self) -> Kind:
        """What a row of the data is: the kind that the algorithm learns from, of several the one that the first file holds."""
        loader = self.config.data_loader_config
        options = DataOptions(**_reading(loader))
        return choose_kind(self._wanted.rows, _paths(self.config.file_dataset), options)

    @cached_property
    def _wanted(self) -> Any:
        return self.trainer_class._data_from_config(self.section)

    @cached_property
    def _streams(self) -> tuple[SampleStream, dict[str, SampleStream]]:
        return make_streams(self.config, self)

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
            **_reading(loader),
            block_size=self.block_size,
            packing=self._packing[0],
            truncation=loader.truncation,
            max_left_out=loader.max_left_out,
            image_columns=loader.image_columns,
            image_tags=self._image_tags(),
            workers=loader.data_loader_num_workers,
            share_prompts=wants_sharing and knows_branches(self.policy.config, self.device),
        )
        parse = loader.parse_special_tokens
        chat = ChatFormat(self.tokenizer, parse_special_tokens=parse, images=self.images, **self._wanted.chat)
        return options, chat


def make_model(
    config: TrainConfig,
    tokenizer: Any,
    device: torch.device,
    empty: bool = False,
    pieces: Pieces | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Build or load the model with the weights that the run starts from, the same on every rank; or `empty`, without any.

    Args:
        config: the whole run.
        tokenizer: of the run, with the tokens that were added.
        device: where it will train.
        empty: without weights, on the meta device.
        pieces: the ids of the tokens that were added, and what they were before; None: there are none.
        options: further keywords of `from_pretrained`.
    """
    # 1. the model as it was, with its first weights
    torch.manual_seed(config.run_config.seed)
    attention = resolve_attention(config.run_config.attention, device)
    wanted, pieces = config.model_config, pieces or {}
    if isinstance(wanted, ModelConfig) and wanted.vocab_size is None:
        wanted = replace(wanted, vocab_size=min(pieces, default=len(tokenizer)))
    if isinstance(wanted, VLMConfig) and wanted.image_token_id is None:
        wanted = replace(wanted, image_token_id=tokenizer.convert_tokens_to_ids(wanted.image_token))
    how: dict[str, Any] = {"attention": attention, "experts": config.run_config.experts, "options": options}
    model = build_model(wanted, empty=empty, overrides=config.model_overrides, **how)
    if config.init_state_dict is not None and not empty:
        load_weights(model, config.init_state_dict, "init_state_dict")
    if config.init_weights_path is not None and not empty:
        load_start(model, config.init_weights_path)

    # 2. what the run gives it
    multiple = config.vocabulary_config.pad_to_multiple_of
    if pieces or multiple is not None:
        check_rows(model, tokenizer, pieces)
        extend_rows(model, pieces, num_ids(tokenizer), multiple)
    context = model_context(model)
    if (
        config.model_overrides and context is not None
    ):  # whoever opens the folder is else warned of rows that can be read
        tokenizer.model_max_length = max(tokenizer.model_max_length, context)
    set_stops(model, ChatFormat(tokenizer).stop_token_ids(), tokenizer.pad_token_id)
    return model


def _refuse_changes(config: TrainConfig) -> None:
    """
    Raises:
        ValueError: the configuration changes a model that is not made from it.
    """
    vocabulary = config.vocabulary_config
    for name, instead, is_changed in (
        ("model_overrides", "build_model(..., overrides=...)", bool(config.model_overrides)),
        ("adapter_config", "llm_trainer.adapt(model, AdapterConfig(...))", config.adapter_config is not None),
        ("freeze", "models.freezing.freeze_parts(model, ...)", bool(config.freeze)),
        (
            "quantization_config",
            "from_pretrained(..., quantization_config=BitsAndBytesConfig(...))",
            config.quantization_config is not None,
        ),
        (
            "vocabulary_config",
            "models.vocabulary.extend_vocabulary(model, tokenizer, ...)",
            bool(vocabulary.add_tokens or vocabulary.add_special_tokens or vocabulary.pad_to_multiple_of),
        ),
    ):
        if is_changed:
            raise ValueError(
                f"{name}: the model is given as an object, which is taken as it is; expected it from {instead}"
            )


def make_streams(config: TrainConfig, build: Builder) -> tuple[SampleStream, dict[str, SampleStream]]:
    """Training and validation data as streams of micro-batches for this rank; of several validation files, by name."""
    loader, world = config.data_loader_config, dist.world_size()
    options, chat = build.options()
    cache = Path(loader.cache_dir or default_folder())

    def stream(
        paths: list[str], batch_size: int, rows_per_step: int, how: DataOptions, order: Callable[[Any], Any]
    ) -> SampleStream:
        with dist.main_process_first(), waiting(f"reading and encoding {', '.join(paths)}", dist.is_main()):
            dataset = load(paths, build.kind, chat, how, cache)
        return open_stream(
            dataset,
            build.kind,
            options,
            build.tokenizer.pad_token_id,
            rows_per_step=rows_per_step,
            batch_size=batch_size,
            rank=dist.rank(),
            world_size=world,
            micro_batch_tokens=loader.micro_batch_tokens,
            layout=build.layout,
            seed=config.run_config.seed,
            num_workers=loader.data_loader_num_workers,
            pin_memory=loader.data_loader_pin_memory,
            **order(dataset),
        )

    def sees(source: SampleStream) -> SampleStream:
        if source.shows_images and not takes_images(build.trainer_class):
            raise ValueError(
                f"file_dataset: its rows show images, and {build.trainer_class.__name__} takes none yet, so that it would "
                "learn without them; expected rows of text. SFTTrainer, Trainer, DPOTrainer and KTOTrainer take images"
            )
        return source

    check_named_files(options, _all_files(config))
    # Training data, all files in one stream.
    rows = config.batch_size * accumulation(config, build.trainer_class) * world
    order = partial(_order, config)
    train = sees(stream(_paths(config.file_dataset), config.batch_size, rows, options, order))

    # Validation data, a stream for each file.
    eval_rows = config.eval_config.eval_batch_size or config.batch_size
    named = _named(_paths(config.eval_dataset)) if config.eval_dataset is not None else {}
    evaluation = {}
    whole = replace(options, duplicates="keep", curriculum=None)
    for name, path in named.items():
        unshuffled = stream([path], eval_rows, eval_rows * world, whole, lambda dataset: {"shuffle": False})
        evaluation[name] = sees(unshuffled)
    if dist.is_main():
        note_overlap(train.dataset, {name: source.dataset for name, source in evaluation.items()})
    return train, evaluation


def _reading(loader: DataLoaderConfig) -> dict[str, Any]:
    """The options of reading, by their names."""
    return {name: getattr(loader, name) for name in fields_of(Reading)}


def _all_files(config: TrainConfig) -> Iterator[tuple[Path, Path]]:
    """Each path of the data of a run with each of its files."""
    evaluation = [] if config.eval_dataset is None else _paths(config.eval_dataset)
    for path in map(Path, [*_paths(config.file_dataset), *evaluation]):
        for file in files_of(path):
            yield path, file


def _paths(files: Any) -> list[str]:
    return [str(files[i]) for i in range(len(files))]


def _named(paths: list[str]) -> dict[str, str]:
    """Files by the names of their metrics: their stems, numbered where they repeat; a single file needs none."""
    if len(paths) == 1:
        return {"": paths[0]}
    named: dict[str, str] = {}
    for path in paths:
        stem = name = Path(path).stem
        number = 2
        while name in named:
            name = f"{stem}_{number}"
            number += 1
        named[name] = path
    return named


def _order(config: TrainConfig, dataset: Any) -> dict[str, Any]:
    """How training data is ordered, as options of `SampleStream`."""
    loader = config.data_loader_config
    hardness = None
    if loader.curriculum is not None:
        hardness = dataset.hardness if loader.hardness_column else dataset.num_tokens
    return {
        "shuffle": loader.data_loader_shuffle,
        "file_weights": _file_weights(config, dataset),
        "interleave": loader.mixture != "files",
        "easy_first": hardness,
        "easy_epochs": loader.curriculum_epochs,
    }


def _file_weights(config: TrainConfig, dataset: Any) -> list[float] | None:
    """How often each file is visited per epoch, where a path of `file_dataset` may be a folder of several.

    Raises:
        ValueError: there is not one weight or share above 0 per path.
    """
    loader, paths = config.data_loader_config, _paths(config.file_dataset)
    given = loader.file_weights or loader.file_shares
    if given is None:
        return None
    if len(given) != len(paths) or min(given) <= 0:
        name = "file_weights" if loader.file_weights else "file_shares"
        raise ValueError(
            f"data_loader_config.{name}: got {given}, expected {len(paths)} numbers above 0, one for each path of file_dataset"
        )
    # 1. how large each path is: its rows, or their tokens
    numbers = [len(files_of(Path(path))) for path in paths]  # of files
    firsts = np.cumsum([0, *numbers])
    sizes = np.array(dataset.file_sizes)
    if loader.mixture == "tokens":
        ends = np.cumsum(dataset.file_sizes)
        sizes = np.array([piece.sum() for piece in np.split(dataset.num_tokens, ends[:-1])])
    path_sizes = np.add.reduceat(sizes, firsts[:-1])
    # 2. how often it is visited: as often as was said, or so that its share of what is there comes out
    weights = np.array(given)
    if loader.mixture != "files":
        weights = weights / weights.sum() * path_sizes.sum() / np.maximum(path_sizes, 1)
    return np.repeat(weights, numbers).tolist()
