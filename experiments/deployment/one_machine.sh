#!/usr/bin/env bash
# A deployment in small: a SuperLink, two institutions' SuperNodes with their own files, one run.
#
#   experiments/deployment/one_machine.sh FOLDER
#
# FOLDER is made anew and keeps the rows, the logs and the run. Everything listens on loopback and
# ends with the script. Between machines, use certificates instead of --insecure: see README.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?usage: one_machine.sh FOLDER}
mkdir "$folder"
folder=$(cd "$folder" && pwd)
fedtune=${FEDTUNE:-fedtune}
bin=$(dirname "$(command -v "$fedtune")")
export PATH=$bin:$PATH  # Flower's programs start each other by name
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
mkdir "$folder"/{user,server,bank,shop}

# Each institution's own rows: here two of the demonstration set's.
"$bin/python" - "$folder" <<'PYTHON'
import json, sys
from fedtune import corpus

for split, rows in zip(("train", "test"), corpus.rows("en")):
    for client in ("bank", "shop"):
        with open(f"{sys.argv[1]}/{client}-{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows if row["client"] == client)
PYTHON

processes=()
trap 'kill "${processes[@]}" 2>/dev/null; wait 2>/dev/null' EXIT
FLWR_HOME=$folder/server "$bin/flower-superlink" --insecure --host 127.0.0.1 --port 8765 \
  >"$folder/superlink.log" 2>&1 & processes+=($!)
export FLWR_HOME=$folder/user
cat >"$FLWR_HOME/config.toml" <<'TOML'
[superlink]
default = "one-machine"
[superlink.one-machine]
address = "127.0.0.1:8765"
insecure = true
TOML
for _ in $(seq 60); do
  if curl --silent --output /dev/null http://127.0.0.1:8765/health; then break; fi
  sleep 1
done
port=9101
for client in bank shop; do
  FLWR_HOME=$folder/$client "$bin/flower-supernode" --insecure --superlink 127.0.0.1:8765 --host 127.0.0.1 --port $port \
    --node-config "client=\"$client\" shard=\"$folder/$client-train.jsonl\" \
test=\"$folder/$client-test.jsonl\" state=\"$folder/$client/state\"" \
    >"$folder/$client.log" 2>&1 & processes+=($!)
  port=$((port + 1))
done
cd "$folder"
"$fedtune" run "$here/two_institutions.toml" --engine one-machine
