#!/usr/bin/env bash
# The owner's SuperLink, until Ctrl-C: TLS, nodes by their registered keys only, and no downloads.
# Run it in the folder that holds federation.yaml. The certificate is made by
#   offsite exchange certificate -o tls --host HOST
set -euo pipefail
. "$(dirname "$0")/flower.sh"
exec flower-superlink --host "$HOST" --port "$PORT" --enable-supernode-auth --disable-runtime-dependency-installation \
  --ssl-certfile "$TLS/certificate.pem" --ssl-keyfile "$TLS/certificate-key.pem" --ssl-ca-certfile "$TLS/certificate.pem"
