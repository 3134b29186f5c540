#!/usr/bin/env bash
# Checks a built `metal-candle` with common clients: dev/clients/run.sh BINARY [CLIENT...]
# Installs the clients, with the versions below, in $CLIENT_CACHE (default: a temporary folder). Exits with 1 if a check fails,
# or if a client that this machine can run cannot be installed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 1 ] || { echo "usage: dev/clients/run.sh BINARY [CLIENT...]" >&2; exit 2; }
binary=$(realpath "$1"); shift
cache=${CLIENT_CACHE:-${TMPDIR:-/tmp}/metal-candle-clients}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

# the name, and the package with its version
clients=(
  "openai openai==3.57.0"
  "anthropic anthropic==2.14.0"
  "langchain langchain-openai==1.7.4"
  "pydantic_ai pydantic-ai-slim[openai]==2.68.0"
  "instructor instructor==1.17.0"
  "llm llm==0.36"
  "litellm litellm==1.110.2"
  "schemathesis schemathesis==4.32.5"
)
npm_package=openai@6.49.0
selected=" $* "
is_selected() { [ "$selected" = "  " ] || [[ $selected == *" $1 "* ]]; }

work=$(mktemp -d)
server=
stop() { [ -z "$server" ] || { kill "$server" 2>/dev/null; wait "$server" 2>/dev/null; }; rm -rf "$work"; }
trap stop EXIT

key=$(python3 -c 'import secrets; print(secrets.token_hex(16))')
printf '[[keys]]\nname = "checks"\nkey = "%s"\nadmin = true\n' "$key" > "$work/keys.toml"
chmod 600 "$work/keys.toml"
mkdir "$work/jobs"
"$binary" serve --model "${SERVER_MODEL:-nano}" --port 0 --metrics --api-key-file "$work/keys.toml" \
  --jobs "$work/jobs" --adapter-root "$work/jobs" > "$work/log" 2>&1 &
server=$!
for _ in $(seq 600); do
  SERVER_ROOT=$(grep -om1 'http://127\.0\.0\.1:[0-9]*' "$work/log") && break
  kill -0 "$server" 2>/dev/null || break
  sleep 0.1
done
[ -n "${SERVER_ROOT:-}" ] || { echo "the server did not start:" >&2; cat "$work/log" >&2; exit 1; }
export SERVER_ROOT SERVER_KEY=$key PYTHONPATH=$here PYTHONDONTWRITEBYTECODE=1 no_proxy=127.0.0.1 NO_PROXY=127.0.0.1

failed=()
for client in "${clients[@]}"; do
  read -r name package <<< "$client"
  is_selected "$name" || { echo "skipped  $name: not named on the command line"; continue; }
  venv=$cache/$package
  if [ ! -e "$venv/installed" ]; then
    echo "installing $package"
    rm -rf "$venv"
    if ! { python3 -m venv "$venv" && "$venv/bin/pip" install -q --disable-pip-version-check "$package" && touch "$venv/installed"; }; then
      echo "FAILED   $name: $package was not installed"
      failed+=("$name")
      continue
    fi
  fi
  "$venv/bin/python" "$here/check_$name.py" || failed+=("$name")
done

if ! is_selected npm; then
  echo "skipped  npm: not named on the command line"
elif ! command -v npm > /dev/null; then
  echo "skipped  npm: this machine has no Node.js"
else
  export CLIENT_MODULES=$cache/npm-$npm_package
  if [ ! -e "$CLIENT_MODULES/installed" ]; then
    echo "installing $npm_package from npm"
    rm -rf "$CLIENT_MODULES"; mkdir -p "$CLIENT_MODULES"
    (cd "$CLIENT_MODULES" && echo '{"private": true}' > package.json && npm install --no-audit --no-fund --silent "$npm_package" && touch installed) \
      || { echo "FAILED   npm: $npm_package was not installed"; failed+=(npm); }
  fi
  node "$here/check_openai.mjs" || failed+=(npm)
fi

if ! is_selected async-openai; then
  echo "skipped  async-openai: not named on the command line"
elif ! command -v cargo > /dev/null; then
  echo "skipped  async-openai: this machine has no Rust toolchain"
elif ! cargo build --quiet --locked --manifest-path "$here/async-openai/Cargo.toml" --target-dir "$cache/async-openai"; then
  echo "FAILED   async-openai: it was not built"
  failed+=(async-openai)
else
  "$cache/async-openai/debug/check-async-openai" || failed+=(async-openai)
fi

if ! kill -0 "$server" 2>/dev/null; then
  echo "FAILED   the server ended:"; tail -20 "$work/log"
  failed+=(server)
elif grep -qi panicked "$work/log"; then
  echo "FAILED   the server panicked:"; grep -i -A5 panicked "$work/log"
  failed+=(server)
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all clients passed"
