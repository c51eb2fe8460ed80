#!/bin/bash
# {title}
# Written by `incubate submit`; edit [slurm] in the config rather than this file.
{options}

set -u
{setup}

program=({program})
config={config}
run_dir={run_dir}
max_requeues={max_requeues}

# One child at a time; a signal to this shell goes on to it, so that it writes a checkpoint and ends with 75.
child= ended_by_slurm=
pass_on() { [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null; }
trap 'pass_on {signal}' {signal}
# scancel, preemption and requeueing send TERM: whether the job comes back is Slurm's to say then, not this script's.
trap 'ended_by_slurm=1; pass_on TERM' TERM INT
step() {
  {launch} "${program[@]}" "$@" --run-dir "$run_dir" &
  child=$!
  # `wait` also returns when a trap has run: wait again until the child is gone.
  while true; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=
  return "$code"
}

# How far this job's phases have come, to notice a restart that gained nothing.
gained() { (cd "$run_dir/progress" 2>/dev/null && grep -ho '"step":[0-9]*' {watched} 2>/dev/null | cksum); }
before=$(gained)

code=0
{steps}

if [ "$code" = 75 ] && [ -z "$ended_by_slurm" ]; then
  count=${SLURM_RESTART_COUNT:-0}
  if [ "$count" -ge "$max_requeues" ]; then
    echo "incubate: stopped, and requeued $count times already: giving up" >&2
    exit 1
  fi
  if [ "$count" -gt 0 ] && [ "$before" = "$(gained)" ]; then
    echo "incubate: stopped without a step gained since the last start: not requeued" >&2
    exit 1
  fi
  # Requeueing keeps the job's number, so that jobs that wait for it still do.
  scontrol requeue "$SLURM_JOB_ID" && exit 0
  echo "incubate: stopped and resumable, but scontrol could not requeue job $SLURM_JOB_ID: submit again" >&2
fi
exit "$code"
