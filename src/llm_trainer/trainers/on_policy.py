"""What trainers that learn from the policy's own completions have in common: who draws them, and who judges them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from llm_trainer.algorithm import StepLoss
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.options import Sampling
from llm_trainer.config.reinforcement import RolloutOptions
from llm_trainer.data.collate import collate_padded, laying
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.rollout_prompts import PromptSource
from llm_trainer.data.rollout_source import RolloutSource
from llm_trainer.data.rollout_store import RolloutError
from llm_trainer.data.rollout_supply import RolloutSupply
from llm_trainer.data.rollouts import FINISHES, Finished, Maker, Rollout, collate_rollout
from llm_trainer.data.stream import SampleStream
from llm_trainer.data.vision import ImageFormat
from llm_trainer.generation.servers import Servers
from llm_trainer.generation.service import GenerationService
from llm_trainer.generation.verify import LIMITS, Verified, probe_ids
from llm_trainer.image_batch import moved
from llm_trainer.layout import takes_images
from llm_trainer.losses.correction import Correction
from llm_trainer.losses.sequences import Sequences
from llm_trainer.models.attention import resolve_attention
from llm_trainer.models.inside import model_context, vocab_size_of
from llm_trainer.models.rewarding import load_judge
from llm_trainer.models.scored import TokenScores
from llm_trainer.models.seeing import see_in_every_batch
from llm_trainer.rewards.of_run import functions_of
from llm_trainer.trainers.agreement import Agreement
from llm_trainer.trainers.ahead import ahead_of
from llm_trainer.trainers.answers import Batch, score
from llm_trainer.trainers.base import BaseTrainer
from llm_trainer.trainers.completions import has_given
from llm_trainer.trainers.drawing import drawing, service_of
from llm_trainer.trainers.given import pad_id_of
from llm_trainer.trainers.judging import judge_of, judged_columns, model_facts, step_ends_of
from llm_trainer.trainers.learned import drawn_from_of, of_learning, with_cuts
from llm_trainer.trainers.played import Partners
from llm_trainer.trainers.prompt_images import PromptImages, format_of, never_drawn, why_not_shown
from llm_trainer.trainers.ptx import PTX, ptx_of
from llm_trainer.trainers.references import seen_once
from llm_trainer.trainers.rollouts import RolloutMaker
from llm_trainer.trainers.routes import ROUTES, check_replay, num_route_columns, routes_of
from llm_trainer.trainers.said import RowsOfIds, check_ids, check_vocabulary, stop_tokens_of
from llm_trainer.trainers.updates import check_divides

if TYPE_CHECKING:
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.trainers.building import Build, Sketch

# What is said when nothing else happens in many rollouts.
PATIENCE = 10
NO_END = (
    "no completion ended before gen_max_seq_len: look at the completions (llm-trainer rollouts), at the stop tokens of the "
    "tokenizer's chat template, and at gen_max_seq_len"
)
APPLIES_TO_NONE = (
    "the reward {} applied to no completion: where it compares with a reference answer, look at the rows' columns "
    "(data_loader_config.columns: {{answer: ...}}); or leave it out"
)


class OnPolicyTrainer(BaseTrainer):
    """A trainer that learns from rollouts, which it makes itself, or from completions that are given.

    Args:
        how: its section.
        samples: completions of each prompt.
        passes: over each rollout.
        rows_per_update: completions of an optimizer step, over all ranks; None: all of a rollout.
        reward_func: judges completions: a function, several, several by name, or `RewardFunctions`.
        reward_weights: of each function, in their order or by name, or of rewards that come with completions; None: 1.
        reward_model: judges them too: a `transformers` classification model with one label, or any module that gives one
            number for each row of ids `[B, T]` under a mask `[B, T]`. With `reward_model_steps` it judges steps: a token
            classifier with one label or two, or a module that gives `[B, T]`. It has the policy's tokenizer.
        ref_model: what the policy is held to, if it is not a copy of it.
        generation_service: draws completions; None: this process does, with a copy of the weights.
        stop_token_ids: that end a completion; None: what tokenizer and model say.
        ptx_loader: batches of language modelling (`trainers.language.Trainer`), whose loss every update has too, times
            `ptx_coef`; it is read again when it ends. None: there is none.
    """

    rows = ("prompts",)
    balances_experts = True
    best_metric: ClassVar[str] = "eval_reward"
    best_is_highest: ClassVar[bool] = True
    shares_prompts = False  # whether the prompt of a group is run once
    how: Any  # its section, of `GenerateConfig` and `RolloutOptions`
    # What is said where all rewards are equal again and again.
    no_variance: ClassVar[str] = (
        "the rewards of every group were equal, so that nothing was learned: look at the completions (llm-trainer rollouts), "
        "take easier or harder prompts, a larger group_size or a higher gen_temperature, or a reward with more steps"
    )
    update_option: ClassVar[str] = (
        "rows_per_update"  # what the argument of this name is called in the trainer's section
    )
    _sees_once = False  # whether policy and reference make the same of every image
    starts_at_reference = False  # whether the policy and what it is held to are the same model at the start

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        how: Any,
        samples: int,
        passes: int,
        rows_per_update: int | None,
        reward_func: Any = None,
        reward_weights: Any = None,
        reward_model: nn.Module | None = None,
        ref_model: nn.Module | None = None,
        generation_service: GenerationService | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ptx_loader: Any = None,
        **options: Any,
    ) -> None:
        self.how = how
        self.answer_ends = tuple(how.gen_stop_strings)
        self._ptx = ptx_of(self, how.ptx_coef, ptx_loader, lambda: self._policy_waits)
        self.samples, self.passes, self.rows_per_update = samples, passes, rows_per_update
        notes: list[str] = []
        # Their processes are forked before there are threads and devices.
        are_alone = reward_model is None and how.rollouts is None and not Partners.are_in(how)
        self.rewards = functions_of(how, reward_func, reward_weights, notes.append, are_alone)
        self.partners = Partners(how) if Partners.are_in(how) else None  # forks too
        self.judge = judge_of(reward_model, how.reward_model_steps, self.partners is not None)
        self._frozen_facts = {}  # of models that say something about a rollout, before an engine shards them
        for name, frozen in (("reward_model", reward_model), ("ref_model", ref_model)):
            if frozen is not None:
                self._frozen_facts[name] = model_facts(frozen)
        self._service = service_of(how, generation_service, model)
        self._never_drawn = never_drawn(model)
        self._route_columns = 0
        if how.replay_routes:
            check_replay(model, how, generation_service is not None, self.partners is not None)
            self._route_columns = num_route_columns(model)
        self._stop_token_ids = stop_token_ids
        self._verified: Verified | None = None
        self._cuts_loader = False
        self._compared: list[str] = []  # reward functions that do not judge the rollouts of another run
        self._in_a_row: dict[str, int] = {}  # rollouts without anything to learn from, by what is said of them
        self._evaluation = options.get("sampling") or Sampling()
        self._maker: RolloutMaker | None = None
        self.correction = correction_of(how)
        if how.eval_samples > 1 and self._evaluation.temperature == 0:
            raise ConfigError(
                f"eval_samples: got {how.eval_samples}, but with temperature 0 in evaluation all completions of a prompt are "
                f"the same; expected 1, or a temperature above 0 (eval_config.temperature)"
            )
        check_vocabulary(model, reward_model=reward_model)
        check_ids(model, gen_suppress_tokens=how.gen_suppress_tokens, stop_token_ids=stop_token_ids or ())
        self._ahead = ahead_of(how, self.rewards, self._judges, generation_service)
        super().__init__(model, *args, **options)
        self._step_ends = step_ends_of(how.reward_model_steps, self.tokenizer)
        # Where others draw, or older weights do, only a limit that is set counts.
        is_own = how.rollouts is None and how.gen_repetition_penalty == 1 and not how.max_staleness
        self._agreement = Agreement(self.machine.precision_name, how.max_logp_difference, is_own)
        if self.judge is not None:
            if self.machine.shows_images:
                see_in_every_batch(self.judge)
            self.machine.place(self.judge)
        if self.rewards is not None:
            self.rewards.say = self.machine.say
            for note in (*notes, *self.rewards.notes):
                self.machine.say(note)

    @classmethod
    def _rewards_from_config(cls, config: "TrainConfig", build: "Build") -> dict[str, Any]:
        """What judges completions, and what ends them, as keywords.

        Raises:
            ConfigError: nothing judges them.
        """
        section = build.section
        options: dict[str, Any] = {"stop_token_ids": build.stop_token_ids}
        source = section.reward_model_checkpoint
        if source is not None and "reward_model" not in build.given:
            if build.tokenizer_of(source, "reward_model_checkpoint").get_vocab() != build.tokenizer.get_vocab():
                raise ConfigError(
                    f"reward_model_checkpoint: {source} has another tokenizer than the policy, so its ids mean other tokens; "
                    f"expected a reward model made of the policy's family"
                )
            build.check_images(source, "reward_model_checkpoint")
            attention = resolve_attention(config.run_config.attention, build.device)
            options["reward_model"] = load_judge(source, section.reward_model_steps is not None, attention)
        judges = (section.rewards, source, section.rollouts, Partners.are_in(section))
        if not any(judges) and not {"reward_func", "reward_model"} & set(build.given):
            raise ConfigError(
                f"{cls.section}: nothing judges completions: expected rewards (such as [exact_match]), a "
                f"reward_model_checkpoint, or {cls.__name__}(train_config=..., reward_func=f) with "
                f"f(prompts, completions, answers) -> list of numbers"
            )
        return options

    @classmethod
    def _reference_from_config(cls, weight: float, build: "Build") -> dict[str, Any]:
        """What the policy is held to, as a keyword; none: there is none, or the constructor copies the policy."""
        source = build.section.ref_model_checkpoint
        if not weight or source is None or "ref_model" in build.given:
            return {}
        return {"ref_model": build.frozen(source)}

    @staticmethod
    def _frozen_costs(weight: float, moves: bool, sketch: "Sketch") -> dict[str, float]:
        """What it costs that the policy is held to something, and that a model judges it, for `llm-trainer plan`."""
        section, costs = sketch.section, dict[str, float]()
        if weight:
            costs = sketch.frozen(section.ref_model_checkpoint, key="ref_model_checkpoint")
            costs["moving_bytes"] = costs["frozen_bytes"] * moves
        if section.reward_model_checkpoint is not None:
            for name, cost in sketch.judge(section.reward_model_checkpoint).items():
                costs[name] = costs.get(name, 0.0) + cost
        return costs

    # Further rows.

    def _further_losses(self) -> Mapping[str, StepLoss]:
        return {} if self._ptx is None else {PTX: self._ptx}

    def _get_extra_config_info(self) -> dict[str, Any]:
        return {} if self._ptx is None else {"further rows": self._ptx}

    def _with_further(self, source: Any, training: bool) -> Any:
        """The steps of a source, with further rows where there are any."""
        return self._ptx.source(source) if training and self._ptx is not None else source

    def _try_episodes(self) -> None:
        """Say how conversations of several turns become rows.

        Raises:
            ConfigError: they cannot.
        """
        if self.partners is None:
            return
        if self.tokenizer is None:
            raise ConfigError(
                f"{type(self).__name__}: environments, tools and agents speak in messages, which a chat template makes ids of; "
                f"expected tokenizer=..., the policy's"
            )
        if not self.partners.gives_rewards and not self._judges_texts:
            raise ConfigError(
                "tools: nothing judges the episodes; expected a reward_func (rewards in a configuration) or a reward model, "
                "which get the whole text"
            )
        self.partners.players.say = self.machine.say
        for note in (*self.partners.players.notes, self.partners.try_out(ChatFormat(self.tokenizer))):
            self.machine.say(note)

    def _play(self, prompts: Sequence[str], generate: Callable[[Any], Any]) -> list[str] | None:
        if self.partners is None:
            return None
        tokens, context = self._evaluation.max_seq_len, model_context(self.base_model)
        return self.partners.play(ChatFormat(self.tokenizer), self._stops(), tokens, context, prompts, generate)

    # Making rollouts.

    @property
    def _judges_texts(self) -> bool:
        """Whether completions get rewards for what they say."""
        return self.rewards is not None or self.judge is not None

    @property
    def _judges(self) -> bool:
        """Whether completions are made here: something judges them, or speaks with the policy."""
        return self._judges_texts or self.partners is not None

    @cached_property
    def _images(self) -> ImageFormat | None:
        """What makes tokens and numbers of images; None: the policy sees none, or nobody says how."""
        return format_of(self.image_format, self.processor, self.base_model)

    def _takes_no_images(self) -> str:
        """Who of a run takes none, and what to do; empty: everybody does."""
        if not takes_images(type(self)):
            return f"{type(self).__name__} takes none; expected GRPOTrainer or PPOTrainer, or prompts of text"
        if isinstance(self._service, Servers):
            return "rollout_servers are sent ids alone; expected none of them: the process that trains then draws"
        if self.partners is not None:
            return "environments, tools and agents speak in text alone; expected reward functions, or prompts of text"
        if self.judge is not None and self._images is not None:
            sees = "one that sees (reward_config on pairs that show images), reward functions"
            why = why_not_shown(self.judge.model, "the reward model", sees, self._images)
            if why:
                return why
        if self._route_columns:
            return "replay_routes knows the routes of text alone; expected replay_routes: false, or prompts of text"
        return ""

    def _build_source(self, source: Any, training: bool) -> Any:
        """Rollouts around a source of prompts; batches that carry completions and rewards are steps as they are."""
        if not self._judges and self.how.rollouts is None:
            return source
        if not self._judges and not training:
            raise ConfigError(
                "rollouts: the stored rollouts bring their rewards along, and nothing judges completions of the prompts of the "
                "validation data; expected a reward_func (rewards in a configuration) or a reward model, or no such data"
            )
        if isinstance(source, SampleStream) and source.knows_images and source.shows_images:
            assert self._images is not None  # the rows were encoded with it
            PromptImages(self._images, self._takes_no_images()).check()
        if training:
            self._cuts_loader = not isinstance(source, SampleStream)  # which says how many rows a rollout has
        supply = RolloutSupply(
            PromptSource(source, self.machine, needs_ids=self.partners is None, images=self._images),
            self._maker_of(training),
            self.machine,
            training=training,
            samples=self._rollout_maker().num_samples(training),
            prompts_per_part=self.how.prompts_per_part,
            keep_rollouts=self.how.keep_rollouts,
            rollouts=self.how.rollouts,
            fits=self._check_stored,
            before=self._before_rollout,
            ahead=self._ahead,
        )
        return RolloutSource(
            supply,
            passes=self.passes,
            rows_per_update=self.rows_per_update,
            pad_id=self._pad_id,
            shares_prompts=lambda: self.shares_prompts,  # known when the model is where it will train
            images=self._images,
        )

    def _check_stored(self, rollout: Rollout) -> None:
        """
        Raises:
            RolloutError: a rollout of another run cannot be learned from as this one is set up.
        """
        self._check_first(rollout)
        self._compare_rewards(rollout)
        needed = [*self._learned_columns(), *(f"{ROUTES}{number}" for number in range(self._route_columns))]
        missing = [name for name in needed if name not in rollout.store.columns]
        if missing:
            raise RolloutError(
                f"rollouts: {rollout.store.folder} has no {' and no '.join(missing)}; expected rollouts of a run with the same "
                f"algorithm, and with several updates on each if this one takes several (grpo_steps, rows_per_update): let "
                f"that run make them so, or set these to 1 and null"
            )
        sees = self._images is not None and self.machine.shows_images and takes_images(type(self))
        if rollout.tower_tokens is not None and not sees:
            raise RolloutError(
                f"rollouts: {rollout.store.folder} has prompts that show images, and this run sees none; expected "
                f"GRPOTrainer or PPOTrainer of a vision-language model with its processor, and a file_dataset whose prompts "
                f"show images"
            )
        largest, vocab_size = int(rollout.store["input_ids"].values.max(initial=0)), vocab_size_of(self.base_model)
        if vocab_size is not None and largest >= vocab_size:
            raise RolloutError(
                f"rollouts: {rollout.store.folder} has the id {largest}, and the model knows {vocab_size} ids; expected "
                f"rollouts of a policy with the same tokenizer"
            )

    def _compare_rewards(self, rollout: Rollout) -> None:
        """Say once that rollouts of another run are learned from as they were rewarded there."""
        theirs = rollout.store.meta["made_of"]["settings"].get("rewards", {})
        ours = [] if self.rewards is None else [name for name in self.rewards.names if name not in theirs]
        if ours and ours != self._compared:
            self._compared = ours
            self.machine.say(
                f"WARNING: rollouts: {rollout.store.folder} was rewarded by {', '.join(theirs)}, and is learned from so; "
                f"{', '.join(ours)} of this run will judge evaluations alone"
            )

    def _check_first(self, rollout: Rollout) -> None:
        """
        Raises:
            ConfigError: it is the first one of a loader, and cannot be cut into the updates that are asked for.
        """
        if not self._cuts_loader or rollout.store.meta["made_of"]["step"]:  # later ones may have fewer prompts
            return
        last, _ = rollout.episodes()
        rows = int((~rollout.is_greedy[last]).sum())
        check_divides(self.update_option, self.rows_per_update, rows, "the completions of a step of the loader")

    @abstractmethod
    def _learned_columns(self) -> tuple[str, ...]:
        """Of a rollout, what an update cannot do without."""

    def _before_rollout(self) -> None:
        """Change, on all ranks together, what a rollout of the training is to be scored with: it stays until the next one."""

    def _maker_of(self, training: bool) -> Maker:
        """What makes the rollouts of a source."""
        return self._rollout_maker()

    def _rollout_maker(self) -> RolloutMaker:
        if self._maker is None:
            self._try_episodes()
            images = None
            if self._images is not None:  # a thread may draw beside the training, which opens images too
                images = PromptImages(self._images.for_a_thread(), self._takes_no_images())
            self._maker = RolloutMaker(
                self.machine,
                self.how,
                self._service_of_run,
                self._finish,
                samples=self.samples,
                dtype=self.machine.dtype,
                of_finished=self._finish_facts(),
                rewards=self.rewards,
                tokenizer=self.tokenizer,
                stop_token_ids=self._stops(),
                context=model_context(self.base_model),
                vocab_size=vocab_size_of(self.base_model),
                max_resamplings=self._max_resamplings,
                draws_greedy=self._draws_greedy,
                eval_samples=self.how.eval_samples,
                pass_reward=self.how.pass_reward,
                shown=self.how.shown_completions,
                padding=pad_id_of(self.tokenizer, self.base_model),
                evaluation=self._evaluation,
                partners=self.partners,
                route_columns=self._route_columns,
                images=images,
                never_drawn=self._never_drawn,
            )
        return self._maker

    @property
    def _draws_greedy(self) -> bool:
        """Whether a rollout has the likeliest completion of each prompt too."""
        return False

    @property
    def _max_resamplings(self) -> int:
        """How often a group whose rewards are all equal is drawn again."""
        return 0

    def _service_of_run(self) -> Verified:
        """Who draws; asked when the model is where it will train. Its weights are verified: by a probe too, but for modules
        whose vocabulary has no known size.
        """
        if self._verified is None:
            service, where = drawing(self._service, self.base_model, self.machine, sees_routes=self._route_columns > 0)
            vocab_size = vocab_size_of(self.base_model)
            if vocab_size is None:
                self._verified = Verified(service, where=where)
            else:
                limit = max(LIMITS[self.machine.dtype], LIMITS[service.dtype or self.machine.dtype])
                probe = probe_ids(vocab_size, model_context(self.base_model), without=self._never_drawn)
                self._verified = Verified(service, self._probe_logprobs, probe, limit, where)
        return self._verified

    def _probe_logprobs(self, probe: list[list[int]]) -> list[list[float]]:
        """By the trained weights, of every token but the first."""

        def logprobs(batch: Batch) -> dict[str, Tensor]:
            return {"logprobs": score(self.model, moved(batch, self.device)).logprobs}

        found = self.machine.score(RowsOfIds(probe), partial(collate_padded, pad_id=self._pad_id), logprobs)
        return [row[1:].tolist() for row in found["logprobs"]]

    @property
    def _pad_id(self) -> int:
        return 0 if self.tokenizer is None else self.tokenizer.pad_token_id or 0

    def _stops(self) -> tuple[int, ...]:
        """What ends a completion; where nothing is known, each is as long as it may be, which is said."""
        found = stop_tokens_of(self.tokenizer, self.base_model)
        if self.partners is not None:
            found = tuple(dict.fromkeys((*ChatFormat(self.tokenizer).stop_token_ids(), *found)))
        if self._stop_token_ids is not None:
            found = tuple(self._stop_token_ids)
        if found and set(found) <= set(self.how.gen_suppress_tokens):
            self.machine.say(
                f"WARNING: gen_suppress_tokens has all tokens that end a completion ({', '.join(map(str, found))}): each will "
                f"have {self.how.gen_max_seq_len} tokens (gen_max_seq_len)"
            )
        if self._stop_token_ids is None and not found and not self.how.gen_stop_strings:
            self.machine.say(
                f"WARNING: no token is known that ends a completion, neither of the tokenizer nor of the model's "
                f"generation_config: each will have {self.how.gen_max_seq_len} tokens (gen_max_seq_len). Pass stop_token_ids, "
                f"or stop_token_ids=[] if that is meant"
            )
        return found

    # Judging and scoring.

    @abstractmethod
    def _finish(self, rollout: Rollout) -> Finished:
        """What is learned of a rollout, as further columns; called by all processes when all rows are there."""

    def _finish_facts(self) -> dict[str, Any]:
        """What `_finish` makes depends on beside weights and rows: a rollout that was made with others is not used."""
        how = {"reward_model_steps": self.how.reward_model_steps, "overlong": self.how.overlong}
        which = {"reference": "base"} if self.how.reference == "base" else {}
        return {**self._frozen_facts, **how, **which, "learned": list(self._learned_columns())}

    def _judged(self, rollout: Rollout) -> dict[str, list[np.ndarray]]:
        """The columns of the reward model, if there is one."""
        if self.judge is None:
            return {}
        images = None if rollout.tower_tokens is None else self._images
        return judged_columns(rollout, self.judge, self.machine, self._pad_id, self._step_ends, images)

    def _note(self, rollout: Rollout, is_missing: np.ndarray, is_level: bool) -> None:
        """Say what will teach nothing, however long it goes on.

        Args:
            is_missing: `[rows]` which completions have no reward.
            is_level: the rewards of all groups are equal.

        Raises:
            ValueError: no completion of the training has a reward, and no function has failed.
        """
        has_none = is_missing.all() and not rollout.column("failed").any()
        if has_none and rollout.is_of_training:
            raise ValueError(_no_reward(rollout))
        if has_none:  # an evaluation, which a run need not end for
            self.machine.say(f"WARNING: in the evaluation {_no_reward(rollout)}")
        if not rollout.is_of_training:
            return
        self._check_first(rollout)
        has_no_end = (rollout.column("finish") == FINISHES.index("length")).all()
        for what, is_so in ((self.no_variance, is_level), (NO_END, has_no_end), *self._without_effect(rollout)):
            count = (self._in_a_row.get(what, 0) + 1) * bool(is_so)
            self._in_a_row[what] = count
            if count and count % PATIENCE == 0:
                self.machine.say(f"WARNING: in {count} rollouts in a row {what}")

    def _without_effect(self, rollout: Rollout) -> list[tuple[str, bool]]:
        """For each of several reward functions: what to say, and whether it applies to no completion of a rollout."""
        names = () if self.rewards is None else self.rewards.names
        values = rollout.column("rewards")  # [rows, F]
        if len(names) < 2 or values.shape[1] != len(names):  # one that applies to none is an error; or they are given
            return []
        is_absent = np.isnan(values).all(axis=0) & (not rollout.column("failed").any())
        return [(APPLIES_TO_NONE.format(name), bool(absent)) for name, absent in zip(names, is_absent, strict=True)]

    def _scored(self, rollout: Rollout, old: bool, reference: Any) -> dict[str, list[np.ndarray]]:
        """Log-probs of all tokens: under the policy as it is now, if `old`, and under the `reference`, if there is one."""
        if not old and reference is None:
            return {}

        def logprobs(batch: Batch) -> dict[str, Tensor]:
            rows, found = moved(of_learning(with_cuts(batch)), self.device), {}
            if self._sees_once:
                rows = seen_once(rows)
            if old:
                found["old_logprobs"] = self._score(self.model, rows).logprobs
            if reference is not None:
                found["ref_logprobs"] = self._score(reference, rows).logprobs
            return found

        _, lay = laying(self.machine.layout, self._pad_id, self._images)
        return self.machine.score(rollout, partial(collate_rollout, lay=lay), logprobs)

    def _score(self, model: Any, rows: Batch, **how: Any) -> TokenScores:
        """A model's scores of rows, as the distribution that completions are drawn from."""
        drawn_from = drawn_from_of(rows, (*self.how.gen_suppress_tokens, *self._never_drawn))
        if model is self.model and self._route_columns:
            how["routes"] = routes_of(rows)
        return score(model, rows, temperature=self.how.gen_temperature, drawn_from=drawn_from, **how)

    # What must hold.

    def _begin_step(
        self, batches: list[Batch], weights: list[float], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        self._agreement.forget()

    def _watch(self, batch: Batch, logprobs: Tensor, sequences: Sequences) -> None:
        """Compare the policy's `logprobs` of a micro-batch with what they should be."""
        if not self.model.training or "sampled_logprobs" not in batch:
            return
        old, sampled = batch.get("old_logprobs", logprobs), batch["sampled_logprobs"]
        drawn = replace(sequences, mask=sequences.mask & ~sampled.isnan())  # the others were given
        self._agreement.see("sampler", old, sampled, drawn)
        if self.machine.step == 0 and self.how.rollouts is None:
            self._agreement.see("ratio", logprobs, old, drawn)
            if self.starts_at_reference and "ref_logprobs" in batch:
                self._agreement.see("reference", logprobs, batch["ref_logprobs"], drawn)

    def _end_step(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """
        Raises:
            DisagreementError: sampler and trainer, or policy and reference, do not agree; nothing is updated.
        """
        if self._maker is None:
            return
        found = self._agreement.check(self.device, self.machine.rank, sum_over_ranks)
        if "sampler" in found:
            mean, largest = found["sampler"]
            self.record("sampling/sampling_logp_difference/mean", mean)
            self.record("sampling/sampling_logp_difference/max", largest)


def correction_of(how: RolloutOptions) -> Correction | None:
    """How a section corrects what was drawn otherwise than it is scored.

    Raises:
        ConfigError: it says more of the correction than that looks at.
    """
    mode = how.off_policy_correction or how.default_correction
    unset = RolloutOptions()
    unread: dict[str, tuple[str, ...]] = {
        "none": ("off_policy_level", "off_policy_cap", "off_policy_floor"),
        "truncate": ("off_policy_floor",),
        "mask": (),
    }
    for name in unread[mode]:
        value = getattr(how, name)
        if value != getattr(unset, name):
            raise ConfigError(
                f"{name}: got {value}, but off_policy_correction is {mode}, which does not look at it; expected "
                f"off_policy_correction: mask (of cap and level also truncate), or leave {name} out"
            )
    if mode == "none":
        return None
    return Correction(mode, how.off_policy_level, how.off_policy_cap, how.off_policy_floor)


def _no_reward(rollout: Rollout) -> str:
    """That no completion has a reward, and what to look at."""
    unanswered = sum(rollout.facts(row)["answer"] is None for row in range(len(rollout)))
    fix = "expected functions that give numbers: None, and NaN, mean that one does not apply"
    if has_given(rollout):
        fix = "expected numbers as the rewards of responses that are given, or functions that give some"
    elif unanswered:
        fix = (
            f"{unanswered} of {len(rollout)} have no reference answer in the data; expected an answer where a reward function "
            f"compares with one: look at the rows' columns (data_loader_config.columns: {{answer: ...}}), or take rewards that "
            f"need none"
        )
    return f"no completion of rollout {rollout.name} has a reward: no reward function applies to any; {fix}"
