# ruff: noqa: ANN001, ANN003, ANN204, D100, D101, D102
# Stands in for enum, as far as the modules go that the plugin shares with the agent: members by name and by value,
# compared by identity, in the order of the class.
class EnumType(type):
    def __iter__(cls):
        return iter(cls.members.values())

    def __call__(cls, value):
        if value.__hash__ is None or value not in cls.members:
            raise ValueError(f"{value!r} is not a valid {cls.__name__}")
        return cls.members[value]


class Enum(metaclass=EnumType):
    def __init_subclass__(cls, **options):
        cls.members = {}
        for name, value in tuple(vars(cls).items()):
            if not name.startswith("_") and name != "members":
                member = object.__new__(cls)
                member.name = name
                member.value = value
                setattr(cls, name, member)
                cls.members[value] = member
