"""The explain and schema commands: what a recipe's keys mean."""

import argparse
import json
import textwrap

from robust_accel.commands import say
from robust_accel.messages import close_to, shown
from robust_accel.reference import Key, about, all_keys, members, schema

_WIDTH = 100


def run(options: argparse.Namespace) -> int:
    """Explain a key (``attack.eps``), its last word (``eps``), a section, or a member of one."""
    asked, keys = options.key, all_keys()
    sections = dict.fromkeys(key.dotted.split(".")[0] for key in keys)
    family = [s for s in sections if s != "output" and asked in (s, *members(s))]
    found = (
        [k for k in keys if k.dotted == asked or k.dotted.startswith(f"{asked}.")]
        or [k for k in keys if k.component and k.component == asked]
        or [k for k in keys if k.dotted.split(".")[-1] == asked]
    )
    if not found and not family:
        known = [*sections, *(key.dotted for key in keys), *(key.component for key in keys)]
        longer = [name for name in known if name.startswith(asked)][:3]
        close = f" (did you mean {' or '.join(longer)}?)" if longer else close_to(asked, known)
        raise ValueError(f"explain: {shown(asked)} is no key of a recipe{close}")
    for section in family:
        text = about(section, asked) if asked in members(section) else _family(section)
        say(text.replace("``", "") + "\n")
    for key in found:
        say(_text(key))
    return 0


def print_schema(_: argparse.Namespace) -> int:
    """Print the JSON schema of recipes, for editors."""
    say(json.dumps(schema(), indent=2))
    return 0


def _family(section: str) -> str:
    return "\n".join(
        f"{name}: {about(section, name).splitlines()[0]}" if name else about(section)
        for name in members(section)
    )


def _text(key: Key) -> str:
    of = f" ({key.component})" if key.component else ""
    default = f"; default: {key.default}" if key.default else "; must be given"
    body = textwrap.indent(textwrap.fill(key.text.replace("``", ""), _WIDTH), "    ")
    return f"{key.dotted}{of}: {key.allowed}{default}".replace(": ;", ":") + f"\n{body}"
