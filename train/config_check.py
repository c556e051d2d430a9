"""How a setting is refused."""


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raises ValueError, naming the setting, its value and what was expected, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} = {value!r}: expected {expected}")
