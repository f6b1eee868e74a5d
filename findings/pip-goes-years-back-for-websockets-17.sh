#!/usr/bin/env bash
# A requirement of websockets 17 beside a client of language models makes pip install an old release of
# that client, of two years ago in one case, with success; one of them cannot even begin to answer.
#
# Seen with pip 26.3, websockets 17.4, openai 3.57.0 and openai-agents 0.24.0 on Python 3.11.7.
#
# The newest releases of both allow websockets below 16 or below 17. One would expect pip to report a
# conflict. It looks for older releases without such a limit instead, and finds some: openai 1.57.4 has
# no extra `realtime`, and so no limit: pip takes it and leaves the extra out, with a warning in the
# midst of its output; and openai-agents 0.13.6 does not need websockets unless one asks for it. `pip
# check` has nothing to complain of. But openai-agents 0.13.6 allows newer releases of openai than it
# works with: it fails when a run begins.
#
# Why it matters here: a server that needs websockets 17 and gets its texts from a model has both in
# its requirements. Without a lower bound for the model's client, what is installed is not what was
# read about, and it changes with one digit elsewhere in the file. The other way round, a requirement
# of openai-agents alone brings websockets 16. A lower bound makes pip report the conflict.
#
# What was seen:
#
#   openai-agents:                    openai 3.57.0, openai-agents 0.24.0, websockets 16.1.1
#   openai-agents, websockets>=17:    openai 2.54.0, openai-agents 0.13.6, websockets 17.4
#   openai[realtime]:                 openai 3.57.0, websockets 15.0.1
#   openai[realtime], websockets>=17: openai 1.57.4, websockets 17.4
#       WARNING: openai 1.57.4 does not provide the extra 'realtime'
#   openai-agents>=0.24, websockets>=17: ResolutionImpossible
#   pip check of the second line: No broken requirements found.
#   its first run: ValidationError, 1 validation error for InputTokensDetails
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$dir/venv"
pip=$dir/venv/bin/pip
"$pip" install -qq pip==26.3
changed=0

expect() { # what is seen, what was seen
    if [[ $1 != *"$2"* ]]; then
        changed=1
    fi
}

resolve() { # requirements: print what pip would install, and its warnings
    "$pip" install -q --dry-run --ignore-installed --report "$dir/report" "$@" 2>"$dir/warnings"
    "$dir/venv/bin/python" - "$dir/report" <<'PYTHON'
import json
import sys

with open(sys.argv[1]) as report:
    found = [item["metadata"] for item in json.load(report)["install"]]
names = "openai", "openai-agents", "websockets"
version = {each["name"]: each["version"] for each in found}
print(", ".join(f"{name} {version[name]}" for name in names if name in version))
PYTHON
    sed -n 's/^WARNING: openai/    &/p' "$dir/warnings"
}

# The upper bounds are the newest releases when this was seen.
agents='openai-agents<=0.24.0'
client='openai[realtime]<=3.57.0'
new='websockets>=17,<=17.4'

seen=$(resolve "$agents")
echo "openai-agents:                    $seen"
expect "$seen" "openai-agents 0.24.0, websockets 16.1.1"
seen=$(resolve "$agents" "$new")
echo "openai-agents, websockets>=17:    $seen"
expect "$seen" "openai-agents 0.13.6, websockets 17.4"
seen=$(resolve "$client")
echo "openai[realtime]:                 $seen"
expect "$seen" "openai 3.57.0, websockets 15.0.1"
seen=$(resolve "$client" "$new")
echo "openai[realtime], websockets>=17: $seen"
expect "$seen" "openai 1.57.4, websockets 17.4"
expect "$seen" "does not provide the extra 'realtime'"

seen="resolved"
if ! "$pip" install -q --dry-run --ignore-installed 'openai-agents>=0.24,<=0.24.0' "$new" \
    >"$dir/output" 2>&1; then
    seen=$(grep -o ResolutionImpossible "$dir/output" | head -n 1)
fi
echo "openai-agents>=0.24, websockets>=17: $seen"
expect "$seen" "ResolutionImpossible"

"$pip" install -qq openai-agents==0.13.6 openai==2.54.0 websockets==17.4 pydantic==2.14.4
seen=$("$pip" check || true)
echo "pip check of the second line: $seen"
expect "$seen" "No broken requirements found."

# No request is made: it does not come so far.
seen=$("$dir/venv/bin/python" - <<'PYTHON'
from agents import Agent, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI

set_tracing_disabled(True)
client = AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="a key", max_retries=0)
agent = Agent(name="voice", model=OpenAIChatCompletionsModel("a model", client))
try:
    Runner.run_sync(agent, "When are you open?")
    print("none")
except Exception as error:
    print(f"{type(error).__name__}, {str(error).splitlines()[0]}")
PYTHON
)
echo "its first run: $seen"
expect "$seen" "ValidationError, 1 validation error for InputTokensDetails"

if [ "$changed" = 1 ]; then
    echo "This has changed." >&2
    exit 1
fi
