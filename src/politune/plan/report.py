"""The plan as a report: its numbers, and how they read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from politune.plan.machine import Machine
from politune.plan.memory import MemoryNeed
from politune.plan.rates import Rate
from politune.report import Facts, Lines, Section, Table


@dataclass(frozen=True)
class StepPlan:
    """How often the optimizer steps, counted as the trainer counts."""

    rows: int
    rows_held_out: int
    rows_per_step: int
    steps_per_epoch: int
    steps: int
    epochs: float
    warmup_steps: int
    checkpoints: int


@dataclass(frozen=True)
class TokenPlan:
    """Tokens of the data with their chat template, without padding, both sides of a pair; None where not known."""

    per_epoch: int | None
    total: int | None
    longest: int
    """Longest sequence that a batch can hold; it sets the peak of the memory."""
    basis: str
    packed: bool
    computed_per_epoch: int | None
    """Tokens that the model computes: packed rows have their prompt once."""
    scored_per_epoch: int | None
    """Tokens that go through the output layer."""
    epochs: float


@dataclass(frozen=True)
class AdapterPlan:
    """The adapter, and what of it lands on the disk."""

    trainable_parameters: int
    trainable_share: float
    file_bytes: int
    checkpoint_bytes: int
    checkpoints_bytes: int | None


@dataclass(frozen=True)
class MemoryPlan:
    """The estimated peak of one process, what there is for it, and what would help where that is less."""

    need: MemoryNeed
    peak_bytes: int
    margin: float
    """The run fits where so many times its estimated peak is available."""
    available_bytes: int | None
    sequence_tokens: int
    call_tokens: int | None
    """Tokens of the largest packed call; None where rows are padded."""
    change: str | None
    """Flags that make it fit; None where it fits, where nothing does, and where it is not known what there is."""
    change_peak_bytes: int | None
    ways: tuple[tuple[str, int], ...]
    """Flags that would each lower the peak by themselves, and the peak that they lead to: for when it runs out after all."""
    formula: tuple[str, ...]
    """What the parts are the sum of, and what is assumed."""

    @property
    def fits(self) -> bool | None:
        """None where it is not known what there is."""
        return None if self.available_bytes is None else self.need.fits_into(self.available_bytes)


@dataclass(frozen=True)
class TimePlan:
    """How long training takes at a measured speed; loading, evaluating and saving come on top."""

    seconds: float
    epoch_seconds: float
    reference_seconds: float
    """Of DPO's reference, in all; in `seconds`, not in `epoch_seconds`."""
    rate: Rate


@dataclass(frozen=True)
class PlanReport:
    """What a run will take. A field is None where it cannot be known yet; `unknown` says why."""

    method: str
    model: str
    dataset: str
    output_dir: str
    processes: int
    fits: bool | None
    tokens_per_call: int | None
    """Most tokens of one packed forward and backward pass; None where rows are padded."""
    steps: StepPlan | None
    tokens: TokenPlan | None
    adapter: AdapterPlan | None
    memory: MemoryPlan | None
    disk_bytes: int | None
    compute_flops: float | None
    time: TimePlan | None
    machine: Machine
    notes: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def headline(self) -> str:
        """One sentence: what, how many steps, how long, and whether it fits."""
        what = f"{self.method.upper()} of {self.model} on {self.dataset}"
        steps = f"{self.steps.steps:,} optimizer steps" if self.steps else "an unknown number of steps"
        time = f", about {format_seconds(self.time.seconds)}" if self.time else ""
        return f"{what}: {steps}{time}; {_memory_in_words(self.memory)}"

    def sections(self) -> Sequence[Section]:
        """What to change, what is planned, what it needs, and what to know about it."""
        return tuple(self._sections())

    def _sections(self) -> Iterator[Section]:
        if self.memory and self.memory.fits is False:
            yield Lines("To make it fit", _advice(self.memory))
        if self.steps:
            yield Facts("Steps", _step_facts(self.steps, self.processes))
        yield Facts("Tokens and time", self._token_facts())
        if self.adapter:
            yield Facts("Adapter", _adapter_facts(self.adapter))
        if self.memory:
            yield _memory_table(self.memory, self.processes, on_gpu=bool(self.machine.gpus))
            yield Lines("How memory is counted", self.memory.formula)
        yield Facts("Machine", _machine_facts(self.machine))
        if self.notes:
            yield Lines("Notes", self.notes)
        if self.unknown:
            yield Lines("Not known yet", self.unknown)

    def _token_facts(self) -> tuple[tuple[str, str], ...]:
        tokens = self.tokens
        return (
            ("Tokens per epoch", _about(tokens.per_epoch if tokens else None)),
            ("Tokens in all", _about(tokens.total if tokens else None)),
            ("Computed per epoch", self._computed_in_words()),
            ("Their source", (tokens.basis if tokens else "") or "unknown"),
            ("Arithmetic", f"about {_format_flops(self.compute_flops)}" if self.compute_flops else "unknown"),
            ("Time", self._time_in_words()),
        )

    def _computed_in_words(self) -> str:
        if self.tokens is None or self.tokens.computed_per_epoch is None:
            return "unknown"
        how = "packed, each prompt once" if self.tokens.packed else "padding not counted"
        calls = f"; calls of up to {self.tokens_per_call:,}" if self.tokens_per_call else ""
        return f"{_about(self.tokens.computed_per_epoch)} ({how}{calls})"

    def _time_in_words(self) -> str:
        if self.time is None:
            return "unknown until the first run of this kind on this machine; --calibrate measures it in seconds"
        time, rate = self.time, self.time.rate
        parts = f"{format_seconds(time.epoch_seconds)} an epoch"
        if time.reference_seconds:
            parts += f", the reference {format_seconds(time.reference_seconds)} in all"
        by = "a finished run" if rate.source == "run" else "a calibration"
        speed = f"{rate.tokens_per_second:,.0f} tokens/s by {by} of {rate.measured} on {rate.device}"
        return f"about {format_seconds(time.seconds)}: {parts} ({speed})"


def format_bytes(count: float | None) -> str:
    """1,500,000 -> `1.5 MB`; decimal units, as disks and GPUs are sold."""
    if count is None:
        return "unknown"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def format_seconds(seconds: float | None) -> str:
    """5,400 -> `1 h 30 min`."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _memory_in_words(memory: MemoryPlan | None) -> str:
    if memory is None:
        return "its memory is not known yet"
    need = f"about {format_bytes(memory.peak_bytes)} of memory"
    if memory.fits is None:
        return f"needs {need}"
    return (
        f"fits ({need})" if memory.fits else f"DOES NOT FIT ({need}, {format_bytes(memory.available_bytes)} available)"
    )


def _advice(memory: MemoryPlan) -> tuple[str, ...]:
    if memory.change is None:
        return ("No combination of checkpointing, batch size, bfloat16, 4 bits and length fits: use a smaller model.",)
    lines = [f"{memory.change}  (about {format_bytes(memory.change_peak_bytes)})"]
    if "--max-length" in memory.change:
        lines.append("Longer rows are then dropped, cut or refused, as data.on_overlength says.")
    return tuple(lines)


def _step_facts(steps: StepPlan, processes: int) -> tuple[tuple[str, str], ...]:
    held_out = f" (and about {steps.rows_held_out:,} for validation)" if steps.rows_held_out else ""
    together = f" in {processes} processes" if processes > 1 else ""
    return (
        ("Rows", f"{steps.rows:,}{held_out}"),
        ("Rows per optimizer step", f"{steps.rows_per_step:,}{together}"),
        ("Optimizer steps per epoch", f"{steps.steps_per_epoch:,}"),
        ("Optimizer steps", f"{steps.steps:,} ({steps.epochs:.4g} epochs)"),
        ("Warm-up", f"{steps.warmup_steps:,} steps"),
    )


def _adapter_facts(adapter: AdapterPlan) -> tuple[tuple[str, str], ...]:
    return (
        ("Trainable parameters", f"{adapter.trainable_parameters:,} ({adapter.trainable_share:.2%} of all)"),
        ("Its file", format_bytes(adapter.file_bytes)),
        ("One checkpoint", f"{format_bytes(adapter.checkpoint_bytes)} (with AdamW's two moments)"),
        ("All checkpoints", f"{format_bytes(adapter.checkpoints_bytes)} at most"),
    )


def _memory_table(memory: MemoryPlan, processes: int, *, on_gpu: bool) -> Table:
    need = memory.need
    rows = (
        ("weights of the base model", need.weights_bytes),
        ("adapter, gradient and AdamW's moments", need.adapter_bytes),
        ("activations", need.activations_bytes),
        ("scores over the vocabulary", need.scores_bytes),
        ("libraries", need.libraries_bytes),
        ("peak", memory.peak_bytes),
    )
    whose = "Each process, with" if processes > 1 else "With"
    what = (
        f"packed calls of up to {memory.call_tokens:,}"
        if memory.call_tokens
        else f"padded sequences of up to {memory.sequence_tokens:,}"
    )
    trust = (
        "not compared with a measurement"
        if on_gpu
        else "within 15 % where it was measured, models of 30M to 360M parameters"
    )
    note = f"{whose} {what} tokens; {trust}. It fits where {memory.margin:g} times the peak is available."
    return Table("Memory, estimated", ("part", "size"), tuple((name, format_bytes(size)) for name, size in rows), note)


def _machine_facts(machine: Machine) -> tuple[tuple[str, str], ...]:
    gpus = ", ".join(f"{gpu.name} ({format_bytes(gpu.total_bytes)})" for gpu in machine.gpus)
    return (
        ("GPUs", gpus or "none found"),
        ("Processor", f"{machine.processor}, {machine.cores} core{'s' if machine.cores != 1 else ''}"),
        ("Memory available", format_bytes(machine.memory_available_bytes)),
        ("Disk free", format_bytes(machine.disk_free_bytes)),
    )


def _about(count: int | None) -> str:
    """Three digits are what such a count is worth."""
    return f"about {float(f'{count:.3g}'):,.0f}" if count is not None else "unknown"


def _format_flops(operations: float) -> str:
    for unit, size in (("exa", 1e18), ("peta", 1e15), ("tera", 1e12), ("giga", 1e9)):
        if operations >= size:
            return f"{operations / size:.3g} {unit}FLOP"
    return f"{operations:.3g} FLOP"
