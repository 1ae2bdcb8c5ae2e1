#!/usr/bin/env bash
# Print the SHA-256 of the app as `flwr run` sends it from this machine: what the owner tells clients to pin.
set -euo pipefail
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
app=$(cd "${1:-$(dirname "$0")}" && pwd)
built=$(mktemp -d)
trap 'rm -r "$built"' EXIT
cd "$built"
flwr build --app "$app" > build.log || { cat build.log >&2; exit 1; }
python -c "import hashlib, pathlib; print(hashlib.sha256(next(pathlib.Path().glob('*.fab')).read_bytes()).hexdigest())"
