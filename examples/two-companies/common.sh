# Sourced by both walks: two companies, each in a folder of its own, know each other's keys; the owner has a package.
# MODEL, PUBLIC and PRIVATE may name another model and other text; DISTILL and TUNE hold further flags of those verbs.

: "${WHERE:=two-companies}" "${MODEL:=smollm2-135m}"
sample() { python -c "from offsite.text.records import bundled; print(bundled('$1'))"; }
field() { python -c "import json, sys; print(json.load(sys.stdin)['$1'])"; } # of the JSON a verb ends with
: "${PUBLIC:=$(sample public)}" "${PRIVATE:=$(sample private)}"
: "${DISTILL:=--steps 4 --calibration-tokens 4096 --evaluation-tokens 1024}" "${TUNE:=--steps 10 --validation 0.005}"

mkdir -p "$WHERE/owner" "$WHERE/client" # the two companies; WHERE itself is what lies between them
cd "$WHERE"
for party in owner client; do
  (umask 077 && head -c 24 /dev/urandom | base64 > "$party/passphrase") # yours is one you remember
done
owner() { (cd owner && offsite "$@" --keys keys --passphrase-file passphrase | tail -n 1); }
client() { (cd client && offsite "$@" --keys keys --passphrase-file passphrase | tail -n 1); }

# Each makes its keys. The public cards may travel by any way; the fingerprints are compared by voice.
owner_is=$(cd owner && offsite keygen -o keys --name owner --passphrase-file passphrase | tail -n 1 | field fingerprint)
client_is=$(cd client && offsite keygen -o keys --name client --passphrase-file passphrase | tail -n 1 | field fingerprint)
cp owner/keys/card.json client/owner.card.json
cp client/keys/card.json owner/client.card.json
(cd owner && offsite trust add client.card.json --fingerprint "$client_is" --keys keys)
(cd client && offsite trust add owner.card.json --fingerprint "$owner_is" --keys keys)

# The owner makes a package, sets the terms for this client, and seals both to it.
# shellcheck disable=SC2086  # DISTILL and TUNE are lists of flags
(cd owner && offsite distill "$MODEL" --public "$PUBLIC" $DISTILL -o package)
(cd owner && offsite job create package --client "$client_is" --registry registry --keys keys \
  --adapter lora --placement all -o job)
mkdir owner/outbox
owner seal job -o outbox/job.sealed
owner seal package --job job -o outbox/package.sealed
