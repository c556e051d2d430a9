"""The one check that all settings share."""


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError that names the setting, its value and what was expected, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} = {value!r}: expected {expected}")
