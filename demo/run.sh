#!/usr/bin/env bash
# make demo: made-up data, a bank of members per task on a small pretrained BERT, then an ensemble of each pool.
set -euo pipefail
out=${1:-demo/output}
export WANDB_MODE=${WANDB_MODE:-offline}
rm -rf "$out/pool" "$out/runs"
python demo/make_data.py "$out/data"
for task in sst quora sts; do
  echo; echo "== $task: a bank of six members"
  lora-ensemble fit --config "configs/$task.yaml" --config configs/demo.yaml \
    --data.root "$out/data" --pool.dir "$out/pool" --trainer.default_root_dir "$out"
done
echo; echo "== ensembles"
dicor compare --pool "$out/pool" --size 4 --plots "$out/plots"
for task in sst quora sts; do
  dicor select --pool "$out/pool" --task "$task" --method dicor --size 4 --output "$out/$task.json"
  dicor report --pool "$out/pool" --task "$task" --size 4 --output "$out/$task.html"
done
cat <<EOF

What next:
  look at   $out/sst.html, quora.html, sts.html  (a page about each ensemble), $out/plots/  (its plots as files)
  select    dicor select --pool $out/pool --task sst --output $out/dicor.json
  predict   lora-ensemble predict --config configs/sst.yaml --config configs/demo.yaml --data.root $out/data --pool.dir $out/pool
  apply     dicor apply --ensemble $out/sst.json --split test --output $out/predictions.csv
  your own data: README.md, "Your own data"
EOF
