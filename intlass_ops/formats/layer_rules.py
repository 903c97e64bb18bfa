"""What configs of GPTQModel and AutoRound say of their layers, of all and by rules of single ones.

    dynamic       {"+:pattern": {"bits": 8, …}, "-:pattern": {}}  GPTQModel; "-:": not quantised
    extra_config  {"name or pattern": {"bits": 16, …}}            AutoRound; 16: not quantised

Patterns are not run: those of a hostile file can take forever. They need not be. Which rule a layer
falls under its tensors show: whether it is quantised, its bits, its groups, the order of its
inputs. So rules are checked, and a layer is held to what the file says of any layer at all.
Not here: what the tensors mean (gptq.py, awq.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import FormatError
from .checkpoint import number

BITS = (2, 3, 4, 8)
_UNQUANTISED = 16  # bits, or more
# What rules of GPTQModel may say, and what of it only says how codes were found.
_DYNAMIC = frozenset({"bits", "group_size", "sym", "desc_act", "pack_dtype"})
_SEARCH = frozenset(
    {
        "damp_percent", "damp_auto_increment", "mse", "static_groups", "true_sequential",
        "act_group_aware", "hyb_act", "calibration", "fallback", "failsafe", "smooth", "smoother",
        "hessian", "gptaq", "foem",
    }
)  # fmt: skip
# The same of AutoRound. Of quantised activations only how many bits they have is looked at.
_EXTRA = frozenset({"bits", "group_size", "sym", "data_type", "act_bits", "scale_dtype"})
_ACTIVATIONS = frozenset({"act_group_size", "act_sym", "act_data_type", "act_dynamic"})
_REFUSED = ("super_bits", "super_group_size", "rotation_config", "spinquant_config")


@dataclass(frozen=True)
class LayerRules:
    """What a quantised layer may be, by any rule of the file."""

    bits: frozenset[int]
    group_sizes: frozenset[int]  # -1: all of K; empty: the file does not say
    symmetric: bool | None  # None: some layers are

    def fits(self, group_size: int, k: int) -> bool:
        """Whether groups of this size are those of the file; one group may be shorter."""
        said = {k if size == -1 else min(size, k) for size in self.group_sizes}
        return not said or group_size in said


def of_gptq(config: Mapping[str, Any], where: str) -> LayerRules:
    """Of a GPTQ config, with the rules that it has in ``dynamic``."""
    rules = []
    for pattern, overrides, here in _rules(config, "dynamic", where):
        if pattern.startswith("-:"):
            continue
        _check_keys(overrides, _DYNAMIC | _SEARCH, here)
        if overrides.get("pack_dtype", "int32") not in ("int32", None):
            raise FormatError(f"{here}: pack_dtype is {overrides['pack_dtype']!r}; expected int32")
        rules.append((overrides, here))
    return _all(config, rules, where)


def of_auto_round(config: Mapping[str, Any], where: str) -> LayerRules:
    """Of an AutoRound config, with the rules that it has in ``extra_config``."""
    _check_integers(config, where)
    rules = []
    for _, overrides, here in _rules(config, "extra_config", where):
        _check_keys(overrides, {*_EXTRA, *_ACTIVATIONS, *_REFUSED}, here)
        bits = overrides.get("bits")
        if type(bits) is int and bits >= _UNQUANTISED:
            continue
        _check_integers(overrides, here)
        rules.append((overrides, here))
    return _all(config, rules, where)


def _rules(
    config: Mapping[str, Any], key: str, where: str
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Pattern, overrides, and a name for errors, of every rule."""
    rules = config.get(key)
    if not isinstance(rules, dict) and rules is not None:
        raise FormatError(f"{where}: {key} is {rules!r}; expected an object")
    for pattern, overrides in (rules or {}).items():
        here = f"{where}: {key} rule {pattern!r}"
        if not isinstance(overrides, dict):
            raise FormatError(f"{here} is {overrides!r}; expected an object")
        yield pattern, overrides, here


def _check_keys(overrides: Mapping[str, Any], known: set[str] | frozenset[str], here: str) -> None:
    for key, value in overrides.items():
        if key not in known and value is not None:
            raise FormatError(f"{here}: {key!r} is not supported (it is {value!r})")


def _check_integers(config: Mapping[str, Any], where: str) -> None:
    """AutoRound has other numbers than integers, and activations and rotations, by the same key."""
    if config.get("data_type", "int") not in ("int", None):
        raise FormatError(f"{where}: data_type is {config['data_type']!r}; expected 'int'")
    act_bits = config.get("act_bits")
    if act_bits is not None and (type(act_bits) is not int or act_bits < _UNQUANTISED):
        raise FormatError(f"{where}: act_bits is {act_bits!r}: these activations are not supported")
    for key in _REFUSED:
        if config.get(key):
            raise FormatError(f"{where}: {key!r} is not supported (it is {config[key]!r})")


def _all(
    config: Mapping[str, Any], rules: list[tuple[dict[str, Any], str]], where: str
) -> LayerRules:
    """What the config and the overrides of its rules say together."""
    bits, sizes = {number(config, "bits", where, *BITS)}, set()
    symmetric = {config.get("sym", False) is True}
    for each, here in [(config, where), *rules]:
        if each.get("group_size") is not None:
            size = number(each, "group_size", here)
            if size < 1 and size != -1:
                raise FormatError(f"{here}: group_size is {size}; expected -1 or more than 0")
            sizes.add(size)
    for overrides, here in rules:
        if overrides.get("bits") is not None:
            bits.add(number(overrides, "bits", here, *BITS))
        flag = overrides.get("sym")
        if flag not in (None, True, False):
            raise FormatError(f"{here}: sym is {flag!r}; expected true or false")
        symmetric |= set() if flag is None else {flag is True}
    both = len(symmetric) > 1
    return LayerRules(frozenset(bits), frozenset(sizes), None if both else symmetric.pop())
