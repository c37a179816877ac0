"""docs/configuration.md, written from the table of keys: `python -m agent.reference > docs/configuration.md`.

Leaves out: every fact about a key (agent.settings); a test keeps the page equal to what this prints.
"""

from __future__ import annotations

import inspect
import sys

from agent import config, settings

_HEAD = """\
# Configuration

One YAML file. It need not exist: every key has a default. `skerry config show --origin` prints what is in
force and where each value comes from.

| installed as | file |
|---|---|
| system service, root | `/etc/skerry/skerry.yaml` |
| a user's own | `$XDG_CONFIG_HOME/skerry/skerry.yaml`, usually `~/.config/skerry/skerry.yaml` |
| `--home DIR` or `SKERRY_HOME` | `DIR/skerry.yaml` |

An unknown key, a key that stands twice, a wrong type or a value out of range is an error with file and line,
and the daemon does not start with it. When the file changes, or on SIGHUP, the daemon reads it again: keys
marked *reloads* apply at once, the others are named in the log and wait for a restart, and a file with an
error changes nothing.

Durations are numbers of seconds or carry a unit: `500ms`, `10s`, `5m`, `1h`, `7d`. Sizes are numbers of bytes
or carry one: `16KiB`, `64MiB`, `2GiB`. Anchors, aliases and files over 1 MiB are refused.

```yaml
log:
  level: info
ipc:
  max_body: 128MiB
  socket_group: skerry-clients
workers:
  threads: 2
```
"""


def render() -> str:
    """The page, as Markdown."""
    parts = [_HEAD]
    for name, struct in settings.sections().items():
        rows = [_row(key) for key in settings.keys().values() if key.section == name]
        table = "\n".join(["| key | default | accepts | meaning | reloads |", "|---|---|---|---|---|", *rows])
        parts.append(f"## {name}\n\n{inspect.getdoc(struct)}\n\n{table}\n")
    return "\n".join(parts)


def _row(key: settings.Key) -> str:
    default = config.format_value(key, key.default)
    reloads = "yes" if key.reloads else "restart"
    return f"| `{key.name}` | `{default}` | {config.expected(key)} | {key.meaning} | {reloads} |"


if __name__ == "__main__":
    sys.stdout.write(render())
