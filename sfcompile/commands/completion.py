"""``sfcompile completion``: a script for bash that completes commands, their options, and values that can be listed.

    eval "$(sfcompile completion)"                                     # in ~/.bashrc
    autoload -U bashcompinit && bashcompinit && eval "$(sfcompile completion)"    # in ~/.zshrc

It is made of the commands' own help, so it cannot know others than they do, and starts no Python while one types.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

_OPTION = re.compile(r"^ +(?:-\w(?: \S+)?, )?(--[a-z][\w-]*)(?: \{([^}]*)\})?", re.MULTILINE)

_SCRIPT = """\
_sfcompile() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands} --help --version"
  else
    case "${{COMP_WORDS[1]}} $before" in
{values}
    *)
      case "${{COMP_WORDS[1]}} $word" in
{options}
      esac ;;
    esac
  fi
  if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$word")); fi
}}
complete -o default -F _sfcompile sfcompile
"""


def completion_script(commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """The script for commands and their parsers. Where it has nothing to offer, bash offers files."""
    values, options = [], []
    for name, parser in commands.items():
        offered = _OPTION.findall(parser.format_help())
        values += [
            f'    "{name} {option}") words="{listed.replace(",", " ")}" ;;' for option, listed in offered if listed
        ]
        options.append(f'      "{name} -"*) words="{" ".join(dict.fromkeys(option for option, _ in offered))}" ;;')
    return _SCRIPT.format(commands=" ".join(commands), values="\n".join(values), options="\n".join(options))
