"""What an algorithm may ask for while it is made from a configuration, and while its costs are planned."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Build(Protocol):
    """Makes what several algorithms need, each thing when it is asked for; `assemble` gives it to `_from_config`.

    Attributes:
        section: the algorithm's own section of the configuration.
        given: keywords that the caller passes himself, which are not to be made.
        kind: what a row of the data is (`data.kinds.Kind`); its `name` is 'text', 'conversations', 'pairs', ....
        device: where this process computes.
        tokenizer: of the run.
        stop_token_ids: that end an answer, by the tokenizer's chat template.
        policy: the model to train, as `_model_from_config` has made it.
        block_size: most tokens of a row of the data; not more than the policy takes.
        streams: training data and then each set of validation data, as `SampleStream`s; tokenized when first asked for.
    """

    section: Any
    given: Mapping[str, Any]

    @property
    def kind(self) -> Any: ...

    @property
    def device(self) -> "torch.device": ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    @property
    def policy(self) -> Any: ...

    @property
    def block_size(self) -> int: ...

    @property
    def streams(self) -> "tuple[Any, ...]": ...

    def model(self, source: str | None = None, in_half: bool = False) -> Any:
        """The language model of the Hugging Face folder `source`; None: the one that the configuration describes.

        Args:
            source: the folder.
            in_half: weights in the precision of products, for a model that is only read.
        """

    def tokenizer_of(self, source: str, key: str) -> Any:
        """The tokenizer in a Hugging Face folder, which `key` of the configuration names.

        Raises:
            ConfigError: there is none.
        """

    def check_images(self, source: str, key: str) -> None:
        """
        Args:
            source: of a model beside the policy, as `key` of the configuration names it.
            key: for messages.

        Raises:
            ConfigError: it sees images, and its processor makes something else of them than that of the run does.
        """

    def leave_out(self, model: "nn.Module") -> None:
        """Freeze what of a model beside the policy no loss reaches, of a tower of images; the rest learns."""

    def frozen(self, source: Any) -> "nn.Module":
        """A model that is only compared with.

        Args:
            source: a Hugging Face folder; or the path of a checkpoint or a state dict, put into a copy of the policy.
        """

    def further(self, files: Any, wanted: "DataRequest", rows_per_step: int, block_size: int) -> Any:
        """A stream of rows beside those of `streams` (`data.stream.SampleStream`).

        Of the options of the data it has those that are not about the columns, the order or the shares of certain files.

        Args:
            files: like `file_dataset`.
            wanted: what rows.
            rows_per_step: over all ranks.
            block_size: most tokens of a row, as far as the model reads them.
        """

    def score(
        self,
        model: "nn.Module",
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        function: "Callable[[Any], Mapping[str, Tensor]]",
        cache: Path,
    ) -> Any:
        """Numbers of every row of a dataset: from the file `cache`, or computed now by all ranks and kept there.

        As `machine.Machine.score` does it in a run.

        Args:
            model: that `function` calls; it is moved to the device.
            dataset: `lengths [rows]` in tokens, and `dataset[index]`.
            collate: its rows -> a batch.
            function: a batch -> by name `[rows]`; every name is a column.
            cache: an .npy file, whose name holds everything that the numbers depend on.

        Returns:
            Array `[rows, columns]`, the same on every rank.
        """


class DataRequest(NamedTuple):
    """What an algorithm wants of the data of a configuration.

    Attributes:
        rows: kinds of `data/kinds`; of several, the first that the first file fits.
        share_prompts: the prompt of a pair is run once, where attention can do it.
        chat: keywords of `ChatFormat`: what of a conversation is trained on.
        couples_rows: as `Algorithm.couples_rows` will say.
    """

    rows: tuple[str, ...]
    share_prompts: bool = False
    chat: Mapping[str, Any] = {}
    couples_rows: bool = False


class Sketch(Protocol):
    """What `llm-trainer plan` knows before any weight exists, for `_plan_costs`; `section` as for `Build`."""

    section: Any

    def frozen(
        self, source: str | None = None, forwards: float = 1.0, in_half: bool = False, key: str = "teacher_model"
    ) -> dict[str, float]:
        """The costs of a frozen model beside the trained one.

        Args:
            source: its Hugging Face folder; None: it has the shape of the trained one.
            forwards: that each token of a batch costs.
            in_half: its weights are kept in the precision of products.
            key: of the configuration that names the folder, for messages.
        """

    def judge(self, source: str) -> dict[str, float]:
        """The costs of a reward model beside the trained one.

        Args:
            source: its Hugging Face folder.
        """

    def sampled(self, completions: int, new_tokens: int, columns: int, only_compared: int = 0) -> dict[str, float]:
        """The costs of completions that are sampled: rows of a step, a copy of the weights, its cache, rollouts on disk.

        Args:
            completions: of each prompt, which has `dataset_block_size` tokens.
            new_tokens: of a completion, at most.
            columns: numbers per token that a rollout gets when it is scored.
            only_compared: further completions of each prompt, which nothing is learned from.
        """

    def critic(self, source: str | None = None) -> "dict[str, Any]":
        """The costs of a model that is trained beside the policy and gives one number per token.

        Args:
            source: the Hugging Face folder of its first weights; None: it has the shape of the policy.
        """
