#!/usr/bin/env bash
# Two companies exchange sealed folders by hand: by mail, on a stick, through any storage both can reach.
set -euo pipefail
. "$(dirname "$0")/common.sh"

# What lies on the stick is unreadable to whoever finds it, and cannot be changed, swapped or sent on unnoticed.
cp -r owner/outbox/job.sealed owner/outbox/package.sealed client/

# The client opens both: signature, recipient, dates, order and every byte are checked before anything appears.
client open job.sealed -o job
client open package.sealed -o package
(cd client && offsite inspect package)
# shellcheck disable=SC2086
(cd client && offsite tune package --job job --data "$PRIVATE" $TUNE -o bundle)
client seal bundle --job job --round 1 --accept-leakage -o bundle.sealed # unaudited: so short a run tells nothing
cp -r client/bundle.sealed owner/

# The owner takes it in, looks at the verdict, accepts, and plugs in.
id=$(owner intake bundle.sealed --registry registry | field id)
(cd owner && offsite registry show "$id" --registry registry --keys keys)
(cd owner && offsite registry accept "$id" --registry registry --keys keys)
(cd owner && offsite plug-in "$MODEL" "$id" --registry registry --keys keys -o adapted)
(cd owner && offsite log verify --registry registry --keys keys)
