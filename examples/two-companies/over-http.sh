#!/usr/bin/env bash
# Two companies exchange the same sealed folders over HTTP; the exchange adds convenience, never trust.
set -euo pipefail
. "$(dirname "$0")/common.sh"
: "${PORT:=8443}"

# The owner serves what it sealed, under a certificate of its own that the client pins.
(cd owner && offsite exchange certificate -o tls --host 127.0.0.1)
cp owner/tls/certificate.pem client/owner.certificate.pem
(cd owner && exec offsite exchange serve --registry registry --outbox outbox --port "$PORT" \
  --certificate tls/certificate.pem --certificate-key tls/certificate-key.pem \
  --keys keys --passphrase-file passphrase) > exchange.json &
exchange=$!
trap 'kill -TERM $exchange 2>/dev/null || true' EXIT
url=https://127.0.0.1:$PORT
(cd client && offsite exchange pull "$url" --kind job --certificate owner.certificate.pem --patience-seconds 120 \
  --keys keys --passphrase-file passphrase -o job.sealed)
client exchange pull "$url" --kind package --certificate owner.certificate.pem -o package.sealed

client open job.sealed -o job
client open package.sealed -o package
# shellcheck disable=SC2086
(cd client && offsite tune package --job job --data "$PRIVATE" $TUNE -o bundle)
client seal bundle --job job --round 1 --accept-leakage -o bundle.sealed # unaudited: so short a run tells nothing
id=$(client exchange push "$url" bundle.sealed --certificate owner.certificate.pem | field id)
client exchange status "$url" bundle.sealed --certificate owner.certificate.pem

# What was verified on arrival waits for the owner's word.
(cd owner && offsite registry accept "$id" --registry registry --keys keys)
(cd owner && offsite plug-in "$MODEL" "$id" --registry registry --keys keys -o adapted)
kill -TERM $exchange
wait $exchange
cat exchange.json
