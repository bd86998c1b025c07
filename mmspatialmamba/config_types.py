"""Names of the types in configs, which are texts, or classes in pure-Python configs."""


def type_name(cfg: object, key: str = 'type') -> str:
    """Returns the name at ``key`` of a config without its scope, or an empty text where there is none."""
    value = cfg.get(key) if isinstance(cfg, dict) else None
    if value is None:
        return ''
    return value.rpartition('.')[-1] if isinstance(value, str) else value.__name__
