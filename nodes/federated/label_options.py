"""Options that say what of a message is learned: which numbers are the input, which is the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from nodes.operator import Context, Flow
from nodes.options import Options
from schemas.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from nodes.federated.labelled import Labelled

TYPES = frozenset({"frame/1", "tensors/1", "readings/1"})


class LabelOptions(Options):
    """What examples are made of."""

    label: str = Field(
        "label", min_length=1, description="attribute of a frame or tensors, or column of readings, that is learned"
    )
    classes: list[str] | str | None = Field(
        None, description="names of the classes, or a file with one a line; if left out, labels are their numbers"
    )
    target: Literal["class", "number"] = Field("class", description="what the label is; number: a regression")
    fields: list[str] | None = Field(
        None, min_length=1, description="columns of readings that are the input, in this order"
    )
    tensor: str | None = Field(None, description="which tensor is the input, where a message has several")
    unlabelled: Literal["reject", "skip"] = Field(
        "reject", description="what becomes of messages and rows without a label. reject: dead letters; skip: left out"
    )

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        if self.target == "number" and self.classes is not None:
            raise ValueError("classes: labels that are numbers have none")
        return self

    def check_labels(self, context: Context) -> None:
        """:raises ConfigError: they do not go together, or a file is not there."""
        names = self.names(context)
        if names is not None and len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(Problem(("classes",), f"the class {twice!r} is there twice"))
        if self.fields is not None and self.label in self.fields:
            raise ConfigError(Problem(("fields",), f"{self.label!r} is the label, so it cannot be part of the input"))

    def names(self, context: Context) -> list[str] | None:
        """The classes' names.

        :raises ConfigError: their file cannot be read.
        """
        if not isinstance(self.classes, str):
            return self.classes
        path = context.path(self.classes)
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(Problem(("classes",), f"cannot read {path}: {error}")) from None

    def accepts(self) -> frozenset[str]:
        return TYPES

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del context
        for flow in inputs:
            if flow.type != "readings/1":
                continue
            if self.fields is None:
                raise ConfigError("say in 'fields' which columns of the readings are the input")
            for key, names in (("fields", self.fields), ("label", [self.label])):
                missing = [name for name in names if flow.fields is not None and name not in flow.fields]
                if missing and flow.fields is not None:
                    hint = did_you_mean(missing[0], flow.fields)
                    raise ConfigError(Problem((key,), f"the readings have no column {missing[0]!r}{hint}"))
        return {}

    def reading(self, context: Context) -> Labelled:
        """Who reads examples so."""
        from nodes.federated.labelled import Labelled

        names = self.names(context)
        return Labelled(
            label=self.label,
            fields=self.fields or (),
            tensor=self.tensor,
            classes=None if names is None else {name: number for number, name in enumerate(names)},
            numbers=self.target == "number",
            skip=self.unlabelled == "skip",
        )
