"""`politune train`, told from top to bottom."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from politune import plan, preview, record, report
from politune.config import Run
from politune.data import sources
from politune.data.format import Table
from politune.data.made import turned_of
from politune.errors import ModelError, OutputError, safe
from politune.models import load
from politune.models.quiet import quiet_libraries
from politune.models.seal import SEAL
from politune.presets import Resolved
from politune.training import checkpoints
from politune.training.directory import Papers, claimed
from politune.training.failures import translated
from politune.training.identity import CALL_TOKENS, check_checkpoint, check_papers, identity_of
from politune.training.outcome import TrainReport, from_document
from politune.training.prepare import Prepared, prepare
from politune.training.processes import is_main_process, use_one_gpu, world_size
from politune.training.signals import StopRequest


def train(
    resolved: Resolved,
    *,
    resume: bool = False,
    offline: bool = False,
    quiet: bool = False,
    calibrate: bool = False,
    measure: bool = False,
    stop: StopRequest,
    say: Callable[[str], None],
    show: Callable[[plan.PlanReport], None],
) -> TrainReport:
    """Trains a LoRA adapter and exports it, or resumes an interrupted run; then measures what that moved, if asked to.

    Args:
        resolved: the validated run.
        resume: go on from the newest whole checkpoint in the run's directory.
        offline: use what is on this machine only.
        quiet: no progress during training.
        calibrate: measure how long the run will take, for the plan (`plan.timed`).
        measure: put base and tuned model to the instruments when the run is done (`lean.measure`, quick).
        stop: what signals ask of the run (`signals.caught`), with the command that resumes it.
        say: takes one line of progress.
        show: takes the plan, before the expensive part.

    Raises:
        PolituneError: one leaf per cause, see `politune.errors`; run.json then says `failed` or `interrupted`.
    """
    run, directory = resolved.run, _directory(resolved.run)
    table = sources.check(run.data)
    load.check(run.model)
    check_trl_table(run)
    use_one_gpu(say)
    trackers: list[Any] = []
    try:
        result = _train(resolved, directory, table, resume, offline, quiet, calibrate, say, show, stop, trackers)
        if measure and is_main_process():
            result = _measured(result, directory, say, trackers)
    finally:
        for tracker in trackers:
            tracker.finish()
    return result


def _train(
    resolved: Resolved,
    directory: Path,
    table: Table | None,
    resume: bool,
    offline: bool,
    quiet: bool,
    calibrate: bool,
    say: Callable[[str], None],
    show: Callable[[plan.PlanReport], None],
    stop: StopRequest,
    trackers: list[Any],
) -> TrainReport:
    run = resolved.run
    with claimed(directory, resolved, resume, stop.resume_words) as papers:
        prepared = prepare(run, table, offline, say)
        is_done = resume and papers.is_done
        if is_done:
            check_papers(papers.document, identity_of(run, prepared, None))
            if papers.flaw is None:
                say("this run is finished: nothing left to train")
                return replace(from_document(papers.document.get("metrics") or {}), steps_done_now=0)
        checkpoint = _newest_checkpoint(directory, say) if resume else None
        former = checkpoints.identity_of(checkpoint) if checkpoint else {}
        estimate = _estimate(run, prepared, directory, former.get(CALL_TOKENS))
        estimate = plan.timed(estimate, run, prepared.base.config, prepared.lengths, calibrate=calibrate, say=say)
        if is_main_process():
            show(estimate)
            _require_disk(estimate, directory)
        identity, metadata = identity_of(run, prepared, estimate.tokens_per_call), _metadata(run, prepared)
        steps = estimate.steps.steps if estimate.steps else None
        is_over = checkpoint is not None and checkpoints.step_of(checkpoint) == steps
        if checkpoint:
            check_checkpoint(checkpoint, identity, is_last=is_over)
        # One that failed before its first checkpoint asks for other settings.
        elif "identity" in papers.document and papers.document.get("status") != "failed":
            check_papers(papers.document, identity)
        only_exports = is_done and is_over
        if is_done and not is_over:
            _require_no_adapter(papers, directory)
        if not only_exports:
            papers.begin(
                identity=identity,
                direction=metadata["politune.direction"],
                base=prepared.base_facts(),
                data=prepared.data_facts(),
                plan=asdict(estimate),
                disclosure=metadata,
            )
        if is_main_process():
            say(f"whatever ends this run, it goes on with: {stop.resume_words}")
        with _offline_from_here(), quiet_libraries(), translated(run.train, estimate, directory):
            # Torch, transformers and TRL come in here, after everything that can be refused without them.
            from politune.training.session import Session

            with Session(run, prepared, directory, identity, metadata, stop, say, quiet) as session:
                session.train(checkpoint, steps)
                if only_exports:
                    say(f"the adapter is exported again: {papers.flaw}")
                    session.export_again()
                    return replace(from_document(papers.document.get("metrics") or {}), steps_done_now=0)
                validation = session.evaluate(prepared.validation, "validation")
                heldout = session.evaluate(prepared.heldout, "heldout")
                session.export()
                result = session.report(validation, heldout)
                trackers += session.hand_over()
        if is_main_process():
            report.write_html(result, directory / "report.html")
        papers.finish(asdict(result))
    return result


def _measured(result: TrainReport, directory: Path, say: Callable[[str], None], trackers: Sequence[Any]) -> TrainReport:
    """With the shift that the run's adapter makes, which also goes onto its page, to its log and to its trackers."""
    gc.collect()  # the model that was trained makes room for the one that is measured
    with _offline_from_here(), quiet_libraries():
        from politune.lean import measure
        from politune.training import callbacks

        found = measure.measure(str(directory), preset="quick", output=directory / "measurement", offline=True, say=say)
    log = callbacks.JsonLog(directory / "log.jsonl", callbacks.EvaluationName())
    at_the_end = SimpleNamespace(global_step=result.optimizer_steps)
    if not log.holds(result.optimizer_steps, found.leans):
        for each in (log, *trackers):
            each.on_log(None, at_the_end, None, logs=found.leans)
    result = replace(result, measurement=found)
    report.write_html(result, directory / "report.html")
    return result


def check_trl_table(run: Run) -> None:
    """Builds TRL's config where the run hands it settings of its own, so that a wrong one is refused before anything.

    Raises:
        ConfigError: TRL has no such setting, or refuses its value.
    """
    if run.trl:
        with quiet_libraries():
            from politune.training import trainer_factory

            trainer_factory.trl_config(run, Path(run.train.output_dir))


def _directory(run: Run) -> Path:
    try:
        return Path(run.train.output_dir).expanduser()
    except RuntimeError as error:
        raise OutputError(
            f"there is no home directory for {safe(run.train.output_dir)}", where="--output_dir"
        ) from error


def _require_no_adapter(papers: Papers, directory: Path) -> None:
    """Refuses to train a finished run again over an adapter that somebody may have changed on purpose.

    Raises:
        ModelError: there is one.
    """
    if (directory / "adapter").is_dir():
        raise ModelError(
            f"the adapter in {safe(directory)} is not as it was exported: {papers.flaw}",
            why="there is no checkpoint of the last step to export it from again",
            fix=f"remove adapter/ to train it again, or {SEAL} in it if it was changed on purpose",
        )


def _newest_checkpoint(directory: Path, say: Callable[[str], None]) -> Path | None:
    found = checkpoints.newest(directory / "checkpoints", say if is_main_process() else None)
    if found is None:
        say("there is no whole checkpoint: starting from the first step")
    return found


def _estimate(run: Run, prepared: Prepared, directory: Path, tokens_per_call: int | None) -> plan.PlanReport:
    machine = plan.probe(directory)
    shape = plan.shape_from_config(prepared.base.config)
    preview.check_modules(run, shape)
    return plan.estimate(run, shape, prepared.lengths, machine, processes=world_size(), tokens_per_call=tokens_per_call)


def _require_disk(estimate: plan.PlanReport, directory: Path) -> None:
    """Refuses a run whose adapter and checkpoints will not fit, what is there of it already counted in."""
    free = estimate.machine.disk_free_bytes
    if estimate.disk_bytes is None or free is None:
        return
    there = checkpoints.taken_bytes(directory / "checkpoints")
    if estimate.disk_bytes > free + there:
        need, have = plan.format_bytes(estimate.disk_bytes), plan.format_bytes(free + there)
        raise OutputError(
            f"{safe(directory)} needs {need} and its disk has {have}",
            fix="free some space, lower --save-total-limit, or choose another --output_dir",
        )


def _metadata(run: Run, prepared: Prepared) -> dict[str, str]:
    table, base = prepared.table, prepared.base
    return record.disclosure_metadata(
        run,
        base=base.public_name,
        base_commit=base.commit,
        base_sha256=prepared.base_sha256,
        base_license=base.license,
        data_name=table.name,
        data_revision=table.revision,
        data_sha256=table.sha256,
        data_generator=table.generator,
        rows=len(prepared.train),
        data_direction=table.direction,
        data_turned=turned_of(table.manifest),
    )


@contextlib.contextmanager
def _offline_from_here() -> Iterator[None]:
    """Everything is on this machine by now: no library asks a hub during training, saving or export."""
    import huggingface_hub.constants as hub

    before, variable = hub.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    hub.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
        os.environ.pop("HF_HUB_OFFLINE") if variable is None else os.environ.update(HF_HUB_OFFLINE=variable)
