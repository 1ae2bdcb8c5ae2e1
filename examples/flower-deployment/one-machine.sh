#!/usr/bin/env bash
# An owner, two clients and Flower between them, on one machine and over loopback, each in a folder of its own.
# MODEL, PUBLIC, ANNA and BERT may name another model and other text; DISTILL and TUNE hold further settings.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${WHERE:=flower-trial}" "${MODEL:=smollm2-135m}" "${ROUNDS:=2}" "${STEPS:=10}"
sample() { python -c "from offsite.text.records import bundled; print(bundled('$1'))"; }
field() { python -c "import json, sys; print(json.load(sys.stdin)['$1'])"; } # of the JSON a verb ends with
: "${PUBLIC:=$(sample public)}" "${ANNA:=$(sample private)}" "${BERT:=$(sample private)}"
: "${DISTILL:=--steps 4 --calibration-tokens 4096 --evaluation-tokens 1024}" "${TUNE:={\"batch_size\": 4}}"
started=()
trap 'kill -TERM "${started[@]}" 2> /dev/null || true; wait' EXIT

mkdir -p "$WHERE/owner"
cd "$WHERE"
where=$PWD
party() { # NAME: keys of its own, and a passphrase
  mkdir -p "$1"
  (umask 077 && head -c 24 /dev/urandom | base64 > "$1/passphrase") # yours is one you remember
  (cd "$1" && offsite keygen -o keys --name "$1" --passphrase-file passphrase | tail -n 1 | field fingerprint > fingerprint)
}
knows() { (cd "$1" && offsite trust add "../$2/keys/card.json" --fingerprint "$(cat "../$2/fingerprint")" --keys keys); }
as() { local who=$1; shift; (cd "$who" && offsite "$@" --keys keys --passphrase-file passphrase | tail -n 1); }

# As with any federation: keys, a package, and for each client a job (docs/federation.md).
party owner
# shellcheck disable=SC2086  # DISTILL is a list of flags
(cd owner && offsite distill "$MODEL" --public "$PUBLIC" $DISTILL -o package)
for name in anna bert; do
  party $name && knows owner $name && knows $name owner
  (cd owner && offsite job create package --client "$(cat ../$name/fingerprint)" --registry registry --keys keys \
    --adapter lora --placement all --rounds "$ROUNDS" -o job-$name)
  as owner seal job-$name -o "../$name/job.sealed"
  as owner seal package --job job-$name -o "../$name/package.sealed"
  as $name open job.sealed -o job
  as $name open package.sealed -o package
done

# The owner: a certificate, the settings of the federation, and the SuperLink.
(cd owner && offsite exchange certificate -o tls --host 127.0.0.1)
cat > owner/federation.yaml << YAML
registry: registry
package: package
model: $MODEL
output: result
keys: keys
passphrase_file: passphrase
rounds: $ROUNDS
steps: $STEPS
heldout: {held: $ANNA}
heldout_tokens: 1024
YAML
(cd owner && exec "$here/superlink.sh") > owner/superlink.log 2>&1 &
started+=($!)
cd owner
. "$here/flower.sh"
pinned=$("$here/digest.sh") # the owner tells it to the clients, who pin it

# Each client: a key of its node, which the owner registers, its settings, and its node.
for name in anna bert; do
  ssh-keygen -q -t ecdsa -b 384 -N '' -f "../$name/node-key"
  until flwr supernode register "../$name/node-key.pub" owner; do sleep 2; done
  private=$ANNA && [ $name = anna ] || private=$BERT
  cat > "../$name/client.yaml" << YAML
package: $where/$name/package
job: $where/$name/job
data: $private
work: $where/$name/rounds
keys: $where/$name/keys
passphrase_file: $where/$name/passphrase
accept_leakage: true
tune: $TUNE
YAML
  (cd "../$name" && exec offsite federate node "$HOST:$PORT" --client client.yaml --app "$pinned" \
    --node-key node-key --root-certificate ../owner/tls/certificate.pem) > "../$name/node.log" 2>&1 &
  started+=($!)
done

flwr run "$APP" owner --stream
cat result/results.json
