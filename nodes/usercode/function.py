"""A user's function as an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

from nodes.operator import Emit, Operator
from nodes.usercode.load import explain, where
from schemas.messages import TYPE_OF, Body, Message


class AnswerError(TypeError):
    """A user's function answered with what is no message."""


class Function(Operator):
    """Calls ``function`` with every message (or body, or list of messages) and sends what it answers.

    A message whose call fails, or whose answer is none, is rejected with the user's file and line; the others go on.

    :param takes: class of the body that is given; None: the whole message.
    :param many: the function takes a list of messages.
    :param ports: port → type of what may be sent there.
    :param file: where the function is, for errors.
    """

    absorbs: ClassVar[bool] = True
    """A function may answer ten rows with one or one with ten: rows count as used once it answered."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        takes: type | None,
        many: bool,
        ports: Mapping[str, str],
        file: Path,
        name: str,
        blocking: bool = False,
    ) -> None:
        self.function = function
        self.takes = takes
        self.many = many
        self.ports = dict(ports)
        self.file = file
        self.name = name
        self.blocking = blocking

    def process(self, messages: list[Message], edge: str, emit: Emit) -> None:
        """Call the function.

        :raises Exception: what a function of many messages raised; the runtime then gives them one by one.
        """
        if self.many:
            self._together(messages, emit)
            return
        for message in messages:
            try:
                answers = self._one(message)
            except AnswerError as error:
                emit.reject(message, "bad-answer", f"{self.file.name}: {error}")
            except Exception as error:  # noqa: BLE001 - whatever a user's code raises costs that message only
                emit.reject(message, "exception", f"{where(error, self.file)}: {explain(error)}")
            else:
                for port, answer in answers:
                    emit.send(answer, port)
                if answers:
                    emit.absorb(message.rows)
                else:
                    emit.filter(message.rows)

    def _one(self, message: Message) -> list[tuple[str, Message]]:
        given: Any = message
        if self.takes is not None:
            if not isinstance(message.body, self.takes):
                raise AnswerError(f"{self.name}() takes {TYPE_OF[self.takes]} and was sent {message.type}")
            given = message.body
        made = [self._answer(a) for a in _each(self.function(given))]
        several = len(made) > 1
        out = []
        for i, (port, answer) in enumerate(made):
            if not isinstance(answer, Message):
                answer = message.derive(answer, part=i if several else None)
            elif several and answer.id == message.id:
                answer = Message(f"{answer.id}/{i}", answer.source, answer.time, answer.body, answer.trace, answer.born)
            out.append((port, answer))
        return out

    def _together(self, messages: list[Message], emit: Emit) -> None:
        out: list[tuple[str, Message]] = []
        seen: set[tuple[str, str]] = set()
        for made in _each(self.function(list(messages))):
            port, answer = self._answer(made)
            if not isinstance(answer, Message):
                raise AnswerError(
                    f"{self.name}() takes many messages, so it answers with messages: message.derive({type(answer).__name__}(…))"
                )
            if (port, answer.id) in seen:
                raise AnswerError(
                    f"{self.name}() answered twice with the id {answer.id!r}; use message.derive(body, part=0)"
                )
            seen.add((port, answer.id))
            out.append((port, answer))
        for port, answer in out:
            emit.send(answer, port)
        rows = sum(m.rows for m in messages)
        if out:
            emit.absorb(rows)
        else:
            emit.filter(rows)

    def _answer(self, made: Any) -> tuple[str, Message | Body]:
        """Port and message or body of one answer.

        :raises AnswerError: it is none, or not of the type that was promised.
        """
        port = next(iter(self.ports))
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], str):
            port, made = made
            if port not in self.ports:
                raise AnswerError(f"{self.name}() answered on port {port!r}; emits names {', '.join(self.ports)}")
        body = made.body if isinstance(made, Message) else made
        kind = TYPE_OF.get(type(body))
        if kind is None:
            raise AnswerError(
                f"{self.name}() answered with {type(body).__name__}; expected a message, a body such as Readings,"
                " (port, message), several of these, or None"
            )
        if kind != self.ports[port]:
            raise AnswerError(f"{self.name}() answered with {kind}; emits says {self.ports[port]}")
        return port, cast("Message | Body", made)


def _each(answer: Any) -> Iterator[Any]:
    """The answers that one return value holds."""
    if answer is None:
        return
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], str):
        yield answer
    elif isinstance(answer, Iterable) and not isinstance(answer, (str, bytes, bytearray, memoryview, Mapping)):
        if hasattr(answer, "dtype"):
            raise AnswerError("a function answered with an array; put it into a body, e.g. Readings or Tensors")
        yield from (a for a in answer if a is not None)
    else:
        yield answer
