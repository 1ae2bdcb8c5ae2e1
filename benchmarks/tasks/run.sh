#!/bin/sh
# The three worked tasks: benchmarks/tasks/run.sh DATA OUT ROWS MODEL [MODEL or flag of task baseline ...]
# DATA is what prepare.py --tasks wrote. Killed and run again it goes on; tables that stand in OUT are left.
set -eu
data=$1 out=$2 rows=$3 model=$4
shift 4
tasks=$(dirname "$0")/../../examples/tasks
mkdir -p "$out"
for task in science intents summaries; do
  [ -e "$out/$task.json" ] || "${PYTHON:-python}" -m offsite task baseline "$tasks/$task/task.yaml" --model "$model" "$@" \
    --data "$data/task_${task}_eval.jsonl.gz" --rows "$rows" -o "$out/$task.json" > /dev/null
done
