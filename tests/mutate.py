"""Mistakes that would train wrongly without a word, each made on purpose: does the fast suite notice?

`python tests/mutate.py [NAME ...]` copies the sources, makes one mistake at a time in the copy, and runs the tests that are
named to catch it. It prints a table, and ends with an error if a mistake survives, or if its text is no longer in the sources.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "llm_trainer"
PASSED, FAILED = 0, 1  # pytest's exit codes


@dataclass(frozen=True)
class Mutation:
    """A mistake.

    Attributes:
        name: what goes wrong.
        file: in `src/llm_trainer`.
        right: text that stands there once.
        wrong: what takes its place.
        tests: that must fail then, and pass otherwise.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]

    def made_in(self, text: str) -> str:
        """The text of `file` with the mistake.

        Raises:
            ValueError: `right` does not stand there exactly once.
        """
        found = text.count(self.right)
        if found != 1:
            raise ValueError(
                f"{self.name}: src/llm_trainer/{self.file} has {self.right!r} {found} times, expected once; the code has "
                "changed: change this line of tests/mutate.py with it"
            )
        return text.replace(self.right, self.wrong)


LOOP, TABLE = "tests/unit/train/test_loop.py", "tests/invariance/test_table.py"
CUT = f"{TABLE}::test_one_process[sft-torch-2x4x1-padded]"
RESUMED = f"{LOOP}::test_a_signal_saves_and_a_second_start_goes_on"
RETRY = "tests/unit/train/test_retry.py"
STREAM = "tests/unit/data/test_stream.py"
ROLLOUTS = "tests/unit/train/test_rollouts.py"
AHEAD = "tests/unit/train/test_rollouts_ahead.py"
MUTATIONS = (
    # Losses.
    Mutation(
        "label smoothing falls on the label alone",
        "losses/language.py",
        "values + loss.label_smoothing * (log_normaliser - logits.mean(-1))",
        "values - loss.label_smoothing * logprobs",
        ("tests/parity/test_language.py",),
    ),
    Mutation(
        "DPO prefers the rejected answer",
        "losses/preference.py",
        "return derivative(chosen, options.f_alpha) - derivative(rejected, options.f_alpha)",
        "return derivative(rejected, options.f_alpha) - derivative(chosen, options.f_alpha)",
        ("tests/parity/test_preference.py",),
    ),
    Mutation(
        "distillation and task change places",
        "losses/distill.py",
        "return kd_coef * distill_loss + (1 - kd_coef) * task_loss",
        "return kd_coef * task_loss + (1 - kd_coef) * distill_loss",
        ("tests/unit/losses/test_distill.py", "tests/unit/trainers/test_distill.py"),
    ),
    Mutation(
        "the first token of a document is a label",
        "data/collate.py",
        "labels[starts] = IGNORE",
        "labels[0] = IGNORE",
        ("tests/unit/data/test_collate.py", "tests/unit/data/test_packing.py"),
    ),
    # Weights of losses, and accumulation.
    Mutation(
        "a total of fractions is 1",
        "train/terms.py",
        "return dict(zip(names, totals, strict=True))",
        "return {name: max(total, 1.0) for name, total in zip(names, totals, strict=True)}",
        (f"{LOOP}::test_fractions_as_loss_weights_change_nothing",),
    ),
    Mutation(
        "a part of a NLL term is a whole one",
        "losses/language.py",
        "torch.where(count == 0, 1, count)",
        "count.clamp(min=1)",
        ("tests/unit/losses/test_preference.py",),
    ),
    Mutation(
        "micro-batches weigh alike",
        "train/terms.py",
        "batch.weight = float(algorithm.loss_of(batch)._loss_weight(batch.batch))",
        "batch.weight = float(algorithm.loss_of(batch)._loss_weight(batch.batch) > 0)",
        (CUT,),
    ),
    Mutation(
        "a batch without terms is not left out",
        "train/terms.py",
        "    if batch.weight:\n        share = loss",
        "    if batch.counts:\n        share = loss",
        (f"{LOOP}::test_micro_batches_without_terms_change_nothing",),
    ),
    Mutation(
        "gradients of an attempt that ran out of memory are kept",
        "train/retry.py",
        "        work.engine.drop_gradients()\n",
        "",
        (f"{RETRY}::test_nothing_of_a_failed_attempt_is_left",),
    ),
    Mutation(
        "metrics of an attempt that ran out of memory are kept",
        "train/retry.py",
        "        work.metrics.go_back(self._metrics)\n",
        "",
        (f"{RETRY}::test_nothing_of_a_failed_attempt_is_left",),
    ),
    Mutation(
        "a rank that ran out of memory says so to nobody",
        "train/retry.py",
        "dist.largest(int(failure is not None), work.engine.device)",
        "failure is not None",
        ("tests/distributed/test_ranks.py",),
    ),
    Mutation(
        "the logged loss is that of the last micro-batch",
        "train/loop.py",
        "loss_sum += add_gradient(",
        "loss_sum = add_gradient(",
        (CUT,),
    ),
    Mutation(
        "gradients of micro-batches do not add up",
        "train/loop.py",
        "        engine.backward(share)\n",
        "        algorithm.optimizer.zero_grad()\n        engine.backward(share)\n",
        (CUT,),
    ),
    # Clipping, updates, optimizers.
    Mutation(
        "gradients are clipped to a norm of 0 where nothing is to be clipped",
        "engine/torch.py",
        "if finite and max_grad_norm > 0:",
        "if finite:",
        (f"{LOOP}::test_no_clipping_is_0_or_none", "tests/unit/engine/test_torch.py"),
    ),
    Mutation(
        "gradients are never clipped",
        "engine/torch.py",
        "if finite and max_grad_norm > 0:",
        "if finite and max_grad_norm > 1e9:",
        (f"{LOOP}::test_no_clipping_is_0_or_none",),
    ),
    Mutation(
        "a gradient that is not finite is used",
        "engine/torch.py",
        "        if finite:\n            self._scaler.step(self._optimizer)\n",
        "        if True:\n            self._scaler.step(self._optimizer)\n",
        (f"{LOOP}::test_a_bad_step_is_skipped_kept_and_counted",),
    ),
    Mutation(
        "Lion's betas change places",
        "optim/own.py",
        "lr, (beta1, beta2) = group",
        "lr, (beta2, beta1) = group",
        ("tests/unit/optim/test_optimizers.py", "tests/parity/test_optim.py"),
    ),
    Mutation(
        "biases and norms decay",
        "optim/groups.py",
        "is_exempt = param.ndim < 2 or",
        "is_exempt = param.ndim < 1 or",
        ("tests/unit/optim/test_optimizers.py",),
    ),
    # Schedule.
    Mutation(
        "the warm-up begins a step late",
        "optim/schedules.py",
        "return start + (self.lr - start) * step / self.warmup_steps",
        "return start + (self.lr - start) * max(0, step - 1) / self.warmup_steps",
        ("tests/parity/test_schedule.py",),
    ),
    Mutation(
        "a skipped step moves the schedule",
        "train/run.py",
        "        else:\n            self._skip(done)\n",
        "        else:\n            self.trainer.scheduler and self.trainer.scheduler.step()\n            self._skip(done)\n",
        (f"{LOOP}::test_a_bad_step_is_skipped_kept_and_counted",),
    ),
    # Evaluation.
    Mutation(
        "evaluation is a mean of means",
        "train/evaluate.py",
        'work.metrics.add("loss", loss * weight, weight)',
        'work.metrics.add("loss", loss, 1.0)',
        (f"{LOOP}::test_evaluation_is_a_mean_over_terms",),
    ),
    Mutation(
        "a batch without terms makes the validation loss NaN",
        "train/evaluate.py",
        "            if weight:",
        "            if True:",
        (f"{LOOP}::test_evaluation_is_a_mean_over_terms",),
    ),
    Mutation(
        "evaluation drops out",
        "engine/score.py",
        "    module.eval()\n",
        "    module.train()\n",
        (f"{LOOP}::test_evaluation_is_without_dropout",),
    ),
    Mutation(
        "a row gets the numbers of another one",
        "engine/score.py",
        "groups[rank :: dist.world_size()]",
        "sorted(groups)[rank :: dist.world_size()]",
        ("tests/unit/engine/test_score.py",),
    ),
    Mutation(
        "the worst model is the best one",
        "state.py",
        "is_best = sign * loss < best - min_delta",
        "is_best = not sign * loss < best - min_delta",
        ("tests/unit/train/test_loop.py::test_the_best_model_is_the_one_with_the_lowest_loss",),
    ),
    # Resume.
    Mutation(
        "a resumed epoch begins anew",
        "train/retry.py",
        "source.steps(self._progress.epoch, self._progress.place)",
        "source.steps(self._progress.epoch, 0)",
        (RESUMED,),
    ),
    # Rollouts.
    Mutation(
        "a rollout of other weights or settings is learned from",
        "data/rollout_supply.py",
        "if stored.made_of == made_of:",
        "if len(stored.made_of) == len(made_of):",
        (f"{ROLLOUTS}::test_a_rollout_of_other_settings_is_set_aside_and_made_anew",),
    ),
    Mutation(
        "a rollout is made ahead by weights that will be too old",
        "data/rollout_supply.py",
        "if left > ahead.max_staleness:",
        "if False:",
        (f"{AHEAD}::test_the_weights_are_as_old_as_they_may_be",),
    ),
    Mutation(
        "an evaluation brings its weights while a rollout is made",
        "data/rollout_source.py",
        "self.ahead.wait()  # what draws is to get other weights",
        "pass  # what draws is to get other weights",
        (f"{AHEAD}::test_an_evaluation_waits_for_what_is_made",),
    ),
    Mutation(
        "the rows of a rollout that no update is to see are learned from",
        "data/rollouts.py",
        "np.flatnonzero((left_out == 0) | self.is_masked)",
        "np.flatnonzero(left_out >= 0)",
        (f"{ROLLOUTS}::test_rows_without_a_token_of_the_policy_are_dropped_and_counted",),
    ),
    Mutation(
        "updates on an epoch's first rollout end the epoch",
        "state.py",
        "self.epoch > 0 and self.position == 0 and self.updates == 0",
        "self.epoch > 0 and self.position == 0",
        (f"{ROLLOUTS}::test_an_epoch_ends_once_and_not_in_its_first_rollout",),
    ),
    Mutation(
        "a resumed rollout is learned from its beginning",
        "data/rollout_source.py",
        "done = place.updates\n        first, before = divmod(done, per_pass)",
        "done = place.updates\n        first, before = 0, 0",
        (f"{ROLLOUTS}::test_a_run_that_was_interrupted_at_any_update_ends_in_the_same_bits",),
    ),
    Mutation(
        "the noise of a step depends on where the run was started",
        "train/loop.py",
        "torch.manual_seed(mix_seeds(work.seed, step, dist.rank()))",
        "step or torch.manual_seed(mix_seeds(work.seed, step, dist.rank()))",
        (f"{LOOP}::test_the_noise_of_a_step_is_its_own",),
    ),
    Mutation(
        "every epoch has the same order",
        "data/stream.py",
        "mix_seeds(self.seed, epoch, number, *again)",
        "mix_seeds(self.seed, 0, number, *again)",
        (STREAM,),
    ),
    Mutation(
        "the optimizer begins anew after a resume",
        "engine/torch.py",
        "load_checkpoint(path, model=self._base, optimizer=self._optimizer,",
        "load_checkpoint(path, model=self._base,",
        (RESUMED,),
    ),
    Mutation(
        "a reward that is missing is 0",
        "rewards/returned.py",
        "return Returned([NAN] * count,",
        "return Returned([0.0] * count,",
        ("tests/unit/rewards/test_functions.py::test_what_is_not_a_number_is_missing_and_says_why",),
    ),
    Mutation(
        "a completion that one function could not judge is worth what the others say",
        "trainers/rollouts.py",
        '        values[rollout.column("failed") != 0] = np.nan\n',
        "",
        (
            "tests/unit/trainers/test_token_rewards.py::test_a_completion_that_a_function_could_not_judge_teaches_nothing",
        ),
    ),
    Mutation(
        "code of a model may open sockets",
        "rewards/confine.py",
        '    "socket": (41, 198),\n',
        "",
        ("tests/unit/rewards/test_code.py::test_the_filter_of_each_machine",),
    ),
    Mutation(
        "code of a model may read all files",
        "rewards/confine.py",
        "    for path in readable:\n",
        "    for path in (*readable, '/'):\n",
        ("tests/unit/rewards/test_code.py::test_what_code_may_do_and_what_is_stopped",),
    ),
    Mutation(
        "weights that are broken before the first step are trained on",
        "train/run.py",
        "        guards.check_weights(self.engine, self.trainer.saved_model)\n",
        "",
        (f"{LOOP}::test_weights_that_are_broken_before_the_first_step_are_named",),
    ),
    # Files.
    Mutation(
        "a checkpoint has its name before its tensors are on the disk",
        "checkpoint/tensor_files.py",
        "        os.fsync(file.fileno())\n",
        "",
        ("tests/unit/checkpoint/test_synced.py",),
    ),
)


def test(sources: Path, tests: tuple[str, ...], log: Path) -> int:
    """Pytest's exit code for `tests` with the package in `sources`, in a process of its own."""
    process = os.fork()
    if process:
        _, status = os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(status)
    code = 3
    try:
        with log.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            import pytest

            sys.path.insert(0, str(sources))
            os.environ["PYTHONPATH"] = str(sources)  # of processes that tests start
            import llm_trainer

            assert Path(llm_trainer.__file__).is_relative_to(sources)
            os.chdir(ROOT)
            quiet = ["-p", "no:cacheprovider", "-W", "ignore:Module already imported"]  # of plugins, by transformers
            code = int(pytest.main(["-x", "-q", "-m", "not slow", *quiet, *tests]))
    except BaseException:
        with log.open("a") as out:
            traceback.print_exc(file=out)
    finally:
        os._exit(code)


def import_once() -> None:
    """What all processes need, but nothing of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pytest  # noqa: F401
        import torch
        import transformers  # noqa: F401

    torch.set_num_threads(1)


def main(names: list[str]) -> None:
    """Make every mistake and print who noticed.

    Raises:
        SystemExit: a mistake survives, or a test fails without one.
    """
    chosen = [mutation for mutation in MUTATIONS if not names or any(name in mutation.name for name in names)]
    import_once()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy, log = folder / "src", folder / "log.txt"
        shutil.copytree(SOURCE, copy / "llm_trainer", ignore=shutil.ignore_patterns("__pycache__"))
        every_test = tuple(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
        if test(copy, every_test, log) != PASSED:
            sys.exit(f"the tests fail without any mistake:\n{log.read_text()[-3000:]}")
        print("| mistake | file | found |\n|---|---|---|", flush=True)
        survivors = []
        for mutation in chosen:
            file = copy / "llm_trainer" / mutation.file
            right = file.read_text()
            file.write_text(mutation.made_in(right))
            started = time.monotonic()
            code = test(copy, mutation.tests, log)
            file.write_text(right)
            found = f"in {time.monotonic() - started:.0f} s"
            if code != FAILED:
                survivors.append(mutation.name)
                found = "NO" if code == PASSED else f"pytest ended with {code}: {log.read_text()[-500:]}"
            print(f"| {mutation.name} | {mutation.file} | {found} |", flush=True)
    if survivors:
        sys.exit(f"{len(survivors)} of {len(chosen)} not found: {'; '.join(survivors)}")
    print(f"\n{len(chosen)} of {len(chosen)} found")


if __name__ == "__main__":
    sys.dont_write_bytecode = True  # two mistakes may come within a second of each other
    main(sys.argv[1:])
