# Sourced by the scripts here, and by the owner's shell before `flwr`: Flower's files in one folder of their own, nothing
# reported and nothing looked up, and the SuperLink under the name `owner`. HOST and PORT are where it listens.

: "${HOST:=127.0.0.1}" "${PORT:=18443}" "${TLS:=$PWD/tls}"
export FLWR_HOME="${FLWR_HOME:-$PWD/flower-home}"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
APP=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

mkdir -p "$FLWR_HOME"
cat > "$FLWR_HOME/config.toml" << TOML
[superlink]
default = "owner"
[superlink.owner]
address = "$HOST:$PORT"
root-certificates = "$TLS/certificate.pem"
TOML
