# SPDX-License-Identifier: Apache-2.0
"""Substitutes for `typing`, `collections.abc` and `signal` on the early-boot path: importing those takes 8 ms."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as signal
    from collections.abc import Callable as Callable
    from collections.abc import Iterable as Iterable
    from collections.abc import Iterator as Iterator
    from collections.abc import Mapping as Mapping
    from collections.abc import Sequence as Sequence
    from typing import Any as Any
    from typing import NamedTuple as NamedTuple
else:
    import _signal as signal  # noqa: F401
    from _collections_abc import Callable, Iterable, Iterator, Mapping, Sequence  # noqa: F401
    from _operator import itemgetter

    Any = object

    class _Fields(type):
        """Turns the annotated names of a class into its fields."""

        def __new__(mcs, name, bases, body):
            fields = tuple(body.get("__annotations__", ()))
            defaults = {each: body.pop(each) for each in fields if each in body}
            getters = {each: property(itemgetter(at)) for at, each in enumerate(fields)}
            return super().__new__(
                mcs, name, bases, {**body, **getters, "__slots__": (), "_fields": fields, "_defaults": defaults}
            )

    class NamedTuple(tuple, metaclass=_Fields):
        """Works like typing.NamedTuple."""

        def __new__(cls, *values, **named):
            fields = cls._fields
            if named or len(values) != len(fields):
                named = {**cls._defaults, **dict(zip(fields, values, strict=False)), **named}
                if len(values) > len(fields) or named.keys() != set(fields):
                    raise TypeError(f"{cls.__name__} has the fields {', '.join(fields)}")
                values = [named[each] for each in fields]
            return tuple.__new__(cls, values)

        def __getnewargs__(self):
            return tuple(self)

        def __repr__(self):
            fields = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True))
            return f"{type(self).__name__}({fields})"

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def _replace(self, **changes):
            return type(self)(**{**self._asdict(), **changes})
