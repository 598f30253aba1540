"""Run a model on each frame, tensor or row of readings; the answers are predictions/1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field

from nodes import kinds
from nodes.backends._backend import Signature
from nodes.operator import Context, Flow, Operator
from nodes.options import Options
from schemas import topics
from schemas.errors import ConfigError, Problem, did_you_mean
from schemas.expressions import Number
from schemas.problems import shown, validated
from schemas.units import Duration

_MOST_LABEL_BYTES = 4_000_000


class Batch(BaseModel):
    """How many messages go through the model at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max: int = Field(default=16, description="Most items of one invoke.", ge=1, le=4096)
    wait: Duration = Field(
        default=5_000_000, description="Longest wait for a batch to fill once one message is there, with unit."
    )


class Config(Options):
    """What model runs, and how its answers are read."""

    model: str = Field(description="Path of the model file; its ending tells the backend.", min_length=1)
    job: str | None = Field(
        None,
        description="Federated job whose global model is taken over whenever there is a newer one, between two batches. 'model' "
        "is where the newest is kept, and need not be there yet.",
        min_length=1,
    )
    coordinator: str | None = Field(
        None,
        description="With job: public key of who leads it, or a file with it; a model that it did not sign is not taken over. "
        "Left out: every model is.",
        min_length=1,
    )
    backend: str | dict[str, Any] | None = Field(
        None, description="The runtime: its name, or {name: options}. Left out: told from the file's ending."
    )
    decoder: str | dict[str, Any] = Field(
        "classification",
        description="What the outputs mean: classification, detection, regression or raw; or {name: options}.",
    )
    labels: str | list[str] | None = Field(
        None,
        description="Names of the classes (or of a regression's numbers), in the model's order: a list, or the path of "
        "a text file with one a line. Left out: numbers.",
    )
    top: int = Field(1, description="How many of the best classes a prediction names.", ge=1)
    fields: list[str] | None = Field(
        None, description="For readings: the columns that make the model's input, in its order.", min_length=1
    )
    scale: Number | None = Field(
        None,
        description="What a camera's whole numbers (uint8, uint16) are multiplied by where the model takes real ones; may be "
        "written 1/255. Frames then travel as bytes, a quarter of what a scale step makes of them. Left out: they are rejected.",
    )
    offset: Number = Field(0.0, description="With scale: added after it.")
    keep: list[str] = Field([], description="For readings: columns that become attributes of the predictions.")
    threads: int = Field(1, description="Threads of one invoke.", ge=1, le=256)
    parallel: int = Field(
        1,
        description="Batches at the same time, each in a copy of the model with threads of its own. Copies with one thread "
        "each do more than one copy with several, whose threads wait for each other.",
        ge=1,
        le=64,
    )
    batch: Batch = Field(Batch(), description="Gathering of messages into one invoke.")
    name: str | None = Field(None, description="Name of the model in predictions; left out: the file's.", min_length=1)
    version: str | None = Field(
        None,
        description="Version of the model in predictions; left out: the first digits of the file's sha256.",
        min_length=1,
    )

    def check(self, context: Context) -> None:
        """The files are there and sound, and model, labels, decoder and fields fit each other."""
        problems: list[Problem] = []
        labels: list[str] = []
        signature: Signature | None = None
        try:
            signature = self._check_model(context)
        except ConfigError as error:
            problems.extend(error.problems)
        try:
            labels = self.read_labels(context)
        except ConfigError as error:
            problems.extend(error.problems)
        try:
            module, options = _chosen("decoder", self.decoder)
            try:
                options.check(context)
                if signature is not None and not problems:
                    module.build(options, labels, self.top).check(signature.outputs)
            except ConfigError as error:
                raise error.under(*self.decoder) if isinstance(self.decoder, dict) else error from None
        except ConfigError as error:
            problems.extend(error.under("decoder").problems)
        if signature is not None and self.fields is not None:
            problems.extend(self._check_fields(signature))
        problems.extend(self._check_coordinator(context))
        if self.scale is None and self.offset:
            problems.append(Problem(("offset",), "there is no 'scale' that it is added after"))
        if self.scale is not None and signature is not None:
            problems.extend(
                Problem(("scale",), f"the model's input {spec} takes no real numbers")
                for spec in signature.inputs
                if not spec.real
            )
        if problems:
            raise ConfigError(*problems)

    def _check_model(self, context: Context) -> Signature | None:
        module, options = self.chosen_backend()
        try:
            options.check(context)
        except ConfigError as error:
            raise error.under("backend", *(self.backend if isinstance(self.backend, dict) else ())) from None
        path = context.path(self.model)
        if self.job is not None:
            if not topics.is_level(self.job):
                raise ConfigError(
                    Problem(("job",), f"expected lower-case letters, digits, - and _, got {shown(self.job)}")
                )
            if not getattr(module, "FOLLOWS", False):
                raise ConfigError(
                    Problem(("job",), "a job's models are run by their trainer: backend: {trained: {trainer: …}}")
                )
            if not path.exists():
                return None
        if not path.is_file():
            raise ConfigError(Problem(("model",), f"no such file: {path}"))
        try:
            return cast("Signature | None", module.inspect(path))
        except ConfigError as error:
            raise ConfigError(*(f"{path.name}: {p.message}" for p in error.problems)).under("model") from None
        except OSError as error:
            raise ConfigError(Problem(("model",), f"cannot read {path}: {error.strerror}")) from None

    def _check_coordinator(self, context: Context) -> Sequence[Problem]:
        if self.coordinator is None:
            return ()
        if self.job is None:
            return (Problem(("coordinator",), "there is no 'job' that it leads", on_key=True),)
        from nodes.federated import key_options

        try:
            key_options.check(context, coordinator=self.coordinator)
        except ConfigError as error:
            return error.problems
        return ()

    def _check_fields(self, signature: Signature) -> list[Problem]:
        fields = self.fields or []
        if len(signature.inputs) != 1:
            return [Problem(("fields",), f"the model has {len(signature.inputs)} inputs; readings fill one")]
        spec = signature.inputs[0]
        wanted = 1
        for n in spec.shape:
            wanted *= n
        if wanted != len(fields):
            return [Problem(("fields",), f"{len(fields)} fields, but the model's input {spec} takes {wanted}")]
        if not spec.real:
            return [Problem(("fields",), f"the model's input {spec} takes no real numbers")]
        return []

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        """Predictions; readings are taken where ``fields`` says which columns."""
        for flow in inputs:
            if flow.type != "readings/1":
                continue
            if self.fields is None:
                raise ConfigError("readings come in: say which columns the model takes: fields: [name, …]")
            if flow.fields is not None:
                for key, names in (("fields", self.fields), ("keep", self.keep)):
                    for i, name in enumerate(names):
                        if name not in flow.fields:
                            raise ConfigError(
                                Problem((key, i), f"no field {name!r} comes in{did_you_mean(name, flow.fields)}")
                            )
        return {"out": Flow("predictions/1")}

    def accepts(self) -> frozenset[str]:
        """What holds numbers."""
        return frozenset({"frame/1", "tensors/1", "readings/1"})

    def chosen_backend(self) -> tuple[ModuleType, Options]:
        """The backend's module and options: the one that is named, or the one that takes the model's ending.

        :raises ConfigError: unknown, or the options are wrong.
        """
        if self.backend is not None:
            try:
                return _chosen("backend", self.backend)
            except ConfigError as error:
                raise error.under("backend") from None
        suffix = Path(self.model).suffix
        known: list[str] = []
        for name in kinds.names("backend"):
            module = kinds.module("backend", name)
            if suffix in module.SUFFIXES:
                return module, module.Config()
            known.extend(module.SUFFIXES)
        ending = f"the ending {suffix!r}" if suffix else "no ending"
        raise ConfigError(
            Problem(("model",), f"no backend takes a model with {ending}; known: {', '.join(sorted(known))}")
        )

    def read_labels(self, context: Context) -> list[str]:
        """The labels; empty where there are none.

        :raises ConfigError: the file is not there, or is no text.
        """
        if self.labels is None:
            return []
        if isinstance(self.labels, list):
            return self.labels
        path = context.path(self.labels)
        try:
            if path.stat().st_size > _MOST_LABEL_BYTES:
                raise ConfigError(Problem(("labels",), f"{path} is no label file: {path.stat().st_size} bytes"))
            lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
        except FileNotFoundError:
            raise ConfigError(Problem(("labels",), f"no such file: {path}")) from None
        except OSError as error:
            raise ConfigError(Problem(("labels",), f"cannot read {path}: {error.strerror}")) from None
        except UnicodeDecodeError:
            raise ConfigError(Problem(("labels",), f"{path} is no text in UTF-8")) from None
        if not lines:
            raise ConfigError(Problem(("labels",), f"{path} is empty"))
        return [line.strip() for line in lines]


def build(config: Config, context: Context) -> Operator:
    """The operator; the model is loaded when the runtime opens it."""
    from nodes.backends._backend import Scaling
    from nodes.inference import Infer
    from nodes.loaded import Plan

    backend, options = config.chosen_backend()
    path = context.path(config.model)
    decoder, reading = _chosen("decoder", config.decoder)
    labels = config.read_labels(context)
    plan = Plan(
        path=path,
        name=config.name or path.stem,
        version=config.version or "",
        backends=lambda file: [backend.build(options, context, file, config.threads) for _ in range(config.parallel)],
        decoder=lambda: decoder.build(reading, labels, config.top),
        fields=config.fields or (),
        keep=config.keep,
        batch=config.batch.max,
        wait=config.batch.wait / 1e9,
        scaling=None if config.scale is None else Scaling(config.scale, config.offset),
        later=config.job is not None,
    )
    if config.job is None:
        return Infer(plan)
    from nodes.federated.following import follow

    job, coordinator = config.job, config.coordinator
    return Infer(plan, lambda operator: follow(operator, context, job, path, coordinator))


def _chosen(family: str, value: str | dict[str, Any]) -> tuple[ModuleType, Options]:
    """The kind that ``value`` names (``name`` or ``{name: options}``), with its options.

    :raises ConfigError: paths are relative to ``value``.
    """
    if isinstance(value, str):
        name, options = value, None
    elif len(value) == 1:
        name, options = next(iter(value.items()))
    else:
        raise ConfigError(f"expected one name, or one name with its options, got {shown(value)} of {len(value)}")
    where: tuple[str, ...] = () if isinstance(value, str) else (name,)
    try:
        module = kinds.module(family, name)
    except ConfigError as error:
        raise ConfigError(Problem(where, str(error), on_key=bool(where))) from None
    kind: type[Options] = module.Config
    try:
        return module, validated(kind, {} if options is None else kind.shorthand(options))
    except ConfigError as error:
        raise error.under(*where) from None
