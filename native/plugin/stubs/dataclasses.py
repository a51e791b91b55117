# ruff: noqa: ANN001, ANN002, ANN003, ANN201, ANN202, ANN204, D100, D101, D103
# Stands in for dataclasses, as far as the modules go that the plugin shares with the agent: fields in order, defaults,
# comparison by value. freeze.py leaves of a field's annotation only that there is one. Nothing protects the fields.
class Factory:
    def __init__(self, make):
        self.make = make


def field(*, default_factory):
    return Factory(default_factory)


def dataclass(**options):
    return with_fields


def with_fields(cls):
    names = tuple(cls.__annotations__)

    def __init__(self, *values, **named):
        given = dict(zip(names, values, strict=False))
        if len(values) > len(names) or given.keys() & named.keys() or named.keys() - set(names):
            raise TypeError(f"{cls.__name__} takes the fields {names}")
        given.update(named)
        for name in names:
            value = given[name] if name in given else getattr(cls, name)
            setattr(self, name, value.make() if isinstance(value, Factory) else value)

    def __eq__(self, other):
        if other.__class__ is not self.__class__:
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def __hash__(self):
        return hash(tuple(getattr(self, name) for name in names))

    cls.__init__ = __init__
    cls.__eq__ = __eq__
    cls.__hash__ = __hash__
    return cls
