"""A process of its own that renders chats, each within limits of time, memory and size, and prints the first fault.

Started by dpo_kit.model.template with a JSON object on its input: template, tokens, chats ([messages, what else the
template is given]), seconds, memory and size (bytes). It writes a dot for each chat and, where one is refused, why. A
chat that takes longer than its seconds ends the process (SIGPROF), whatever it is doing.
"""

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def main() -> None:
    given = json.load(sys.stdin)
    if sys.platform == "linux":  # only Linux says what importing took, and obeys a limit beside it
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + given["memory"],) * 2)
    for messages, options in given["chats"]:
        signal.setitimer(signal.ITIMER_PROF, given["seconds"])
        if fault := _fault(given, messages, options):
            sys.stdout.write(fault)
            return
        sys.stdout.write(".")
        sys.stdout.flush()


def _fault(given: dict[str, Any], messages: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    messages = [{key: value for key, value in each.items() if value is not None} for each in messages]
    options_given = {"chat_template": given["template"], **given["tokens"], **options}
    try:
        text = render_jinja_template([messages], **options_given)[0][0]
    except MemoryError:
        return "needs too much memory"
    except Exception as error:  # a template that refuses a chat does so again, and in words, where it is used
        return f"leaves its sandbox: {error}" if type(error).__name__ == "SecurityError" else None
    limit = given["size"] + 16 * len(json.dumps([messages, options]))
    return f"writes {len(text)} characters, more than {limit}" if len(text) > limit else None


if __name__ == "__main__":
    main()
