"""One `moqa.compress` job: its inputs, read and checked, and what several functions need from them."""

from pathlib import Path

from moqa.compression.nested import nested_options
from moqa.compression.options import CompressOptions
from moqa.compression.result import is_unfinished
from moqa.data import Data, Source
from moqa.execution import Executor, LocalExecutor
from moqa.format.cache import has_cache
from moqa.format.reader import open_checkpoint
from moqa.format.tiles import check_group_size
from moqa.memory.limit import MemoryLimit
from moqa.methods.registry import METHODS
from moqa.models.load import read_config
from moqa.models.view import ModelView
from moqa.originals.folder import locate
from moqa.planning import STRATEGIES, Budget, MemoryBudget, Plan, plan
from moqa.planning.candidates import smallest_widths
from moqa.planning.run import check_budget
from moqa.profiling import Profile, read_profile
from moqa.profiling.blank import blank_profile
from moqa.profiling.record import Settings
from moqa.profiling.sensitivity import GROUPS
from moqa.profiling.store import RECORD
from moqa.quantization.cache import parse_cache
from moqa.storage.folders import check_free
from moqa.tasks import task_of
from moqa.training.run import check_training


class CompressJob:
    """The arguments of `moqa.compress`, resolved; invalid ones are refused before anything is measured.

    Args:
        model: as for `moqa.compress`, like all arguments.

    Attributes:
        model: as typed.
        folder: folder of the model.
        out: checkpoint folder to make.
        options: all other options.
        budget: limit in bytes; None without a budget.
        fitted: texts that the checkpoint is fitted on.
        held_out: texts of the proof.
        tokens: tokens of the proof.
        windows: windows of each text of the proof; None for all.
        memory: memory that a process may take.
        executor: where the work is done.
        strategy: of the plan.
        method: quantization method of the checkpoint and its baselines.
        profile_folder: where the profile is or will be.
    """

    def __init__(
        self, model: str | Path, data: Data, budget: Budget | str | None, out: str | Path, *, held_out: Data | None,
        options: CompressOptions, memory: MemoryLimit | None, executor: Executor | None,
    ) -> None:  # fmt: skip
        options = nested_options(options, budget)
        self.model, self.out, self.options = str(model), Path(out), options
        self.profile_folder = options.profile or self.out.with_name(self.out.name + ".profile")
        self.executor = executor or LocalExecutor()
        self.method = METHODS.find(options.method)
        check_group_size(options.group_size)
        if options.cache is not None:
            parse_cache(options.cache)
        check_training(options.recover, options.optimizer)
        if not is_unfinished(self.out, options.proof):
            check_free(self.out, options.overwrite)
        self.budget = Budget.of(budget) if isinstance(budget, str) else budget
        self.strategy = STRATEGIES.find(options.strategy)
        if isinstance(self.budget, MemoryBudget):
            self.budget.check(
                options.widths, options.symmetric, encodings=options.encodings,
                floors=smallest_widths(options.floors, self.strategy.floor, self.budget.model.view.has_experts),
                groups=options.groups or (options.group_size, *GROUPS), mixed=self.strategy.mixes,
            )  # fmt: skip
        check_budget(self.strategy, self.budget, "give --bpw, --size or --fit")
        self.memory = self.executor.memory(memory)
        self.folder = locate(self.model)
        task = task_of(read_config(self.folder))
        reader = task.reader(self.folder)
        self.fitted, self.held_out, self.tokens = task.sources(data, reader), list[Source](), 0
        self.windows = None if held_out else options.samples
        if options.proof:
            if held_out:
                self.held_out = task.sources(held_out, reader)
            else:
                pairs = [task.split(distribution) for distribution in self.fitted]
                self.fitted, self.held_out = [first for first, _ in pairs], [second for _, second in pairs]
            # a text that is too short for the proof is refused now, not after the checkpoint is written
            samples = [task.cut(text, reader, options.context, self.windows) for text in self.held_out]
            self.tokens = sum(task.count(sample.inputs) for sample in samples)

    @property
    def is_profiled(self) -> bool:
        """Whether the profile exists already."""
        return (self.profile_folder / RECORD).is_file()

    def plan(self, profile: Profile) -> Plan:
        """Make the plan from a profile."""
        return plan(
            profile, self.budget, strategy=self.options.strategy, ties=self.options.ties,
            known=[distribution.name for distribution in self.fitted], widths=self.options.widths,
            hedge=self.options.hedge, objective=self.options.objective, scope=self.options.scope,
            fixed=self.options.fixed, encodings=self.options.encodings, groups=self.options.groups,
            floors=self.options.floors, seed=self.options.seed,
        )  # fmt: skip

    def expected(self, view: ModelView) -> tuple[Profile, Plan]:
        """The existing profile, or a blank one of the same size, and a plan made from it."""
        if self.is_profiled:
            measured = read_profile(self.profile_folder)
        else:
            options = self.options
            settings = Settings(
                context=view.task.context(options.context), samples=options.samples, seed=options.seed,
                group_size=options.group_size, symmetric=options.symmetric, method=options.method,
                sensitivity=self.strategy.needs_sensitivity,
            )  # fmt: skip
            own = options.samples if options.self_samples is None else options.self_samples
            own = own if view.task.writes_samples else 0
            names = [distribution.name for distribution in self.fitted]
            measured = blank_profile(view, self.model, names, settings, own)
        return measured, self.plan(measured)

    def is_quantized(self, chosen: Plan, measured: Profile) -> bool:
        """Whether the checkpoint of a plan and its profile is finished except for its proof."""
        if not is_unfinished(self.out, self.options.proof):
            return False
        manifest = open_checkpoint(self.out).manifest
        schemes = {name: unit.scheme for name, unit in manifest.units.items()}
        fitted = {name: measured.record.distributions[name].fitted for name in chosen.known}
        return (
            (manifest.fingerprint, manifest.method, schemes) == (chosen.fingerprint, self.options.method, chosen.units)
            and (manifest.mixture, manifest.fitted) == (chosen.mixture, fitted)
            and sorted(manifest.nested) == sorted(self.options.widths_nested)[:-1]
            and has_cache(self.out) == (self.options.cache is not None)
            and (manifest.recovery is None or self.options.recover is not None)
        )
