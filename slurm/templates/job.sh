#!/bin/bash
# {title}
# Written by `incubate submit`; edit [slurm] in the config rather than this file.
{options}

# The early signal and TERM are noted from the first line on. Either goes on to the one child as USR2, at which the program
# writes a checkpoint and ends with 75. Not as TERM: srun would kill the ranks at once.
child='' told='' ended_by_slurm=''
pass_on() { [ -z "$child" ] || kill -s USR2 "$child" 2>/dev/null; }
trap 'told=1; pass_on' {signal}
# scancel, preemption and requeueing send TERM: whether the job comes back is Slurm's to say then, not this script's.
trap 'ended_by_slurm=1; pass_on' TERM INT

# Submitted from within a step, the job would take itself for a part of that one; your own OMPI_MCA_* stay.
for name in ${!PMI_@} ${!PMIX_@} ${!OMPI_COMM_@} ${!SLURM_STEP_@} ${!SLURM_STEPID@} ${!SLURM_CPU_BIND@} {foreign}; do
  case $name in PMIX_MCA_*) ;; *) unset "$name" ;; esac
done

# Modules and environments read variables that are not set.
{setup}
set -u

program=({program})
config={config}
run_dir={run_dir}
max_requeues={max_requeues}
job={job}

step() {
  local again
  [ -z "$told$ended_by_slurm" ] || return 75
  {launch} "${program[@]}" "$@" --run-dir "$run_dir" &
  child=$!
  # Told between the lines above: nobody was there to hear it.
  [ -z "$told$ended_by_slurm" ] || pass_on
  # `wait` also returns when a trap has run: wait again until the child is gone, and once more for its code.
  while true; do
    wait "$child"
    code=$?
    [ "$code" -gt 128 ] || break
    kill -0 "$child" 2>/dev/null && continue
    wait "$child"
    again=$?
    [ "$again" = 127 ] || code=$again
    break
  done
  child=
  # Told before it listened, it was ended by the signal, with nothing of this start lost.
  [ -z "$told$ended_by_slurm" ] || [ "$code" != $((128 + $(kill -l USR2))) ] || code=75
  return "$code"
}

# How many steps this job's phases have saved, to notice a restart that gained nothing. A phase that still says it runs was
# lost with its node: what it had done since its checkpoint does not count.
steps_saved() {
  local total=0 number
  for number in $(cd "$run_dir/progress" 2>/dev/null && grep -Ls '"state":"running"' {watched} |
    xargs -r grep -ho '"step":[0-9]*'); do
    total=$((total + ${number#*:}))
  done
  echo "$total"
}
before=$(steps_saved)

code=0
{steps}

if [ "$code" = 75 ] && [ -z "$ended_by_slurm" ]; then
  count=${SLURM_RESTART_COUNT:-0}
  if [ "$count" -ge "$max_requeues" ]; then
    echo "incubate: stopped, and requeued $count times already: giving up" >&2
    exit 1
  fi
  if [ "$count" -gt 0 ] && [ "$(steps_saved)" -le "$before" ]; then
    echo "incubate: stopped without a step gained since the last start: not requeued" >&2
    exit 1
  fi
  # Requeueing keeps the job's number, so that jobs that wait for it still do.
  scontrol requeue "$job" && exit 0
  echo "incubate: stopped and resumable, but scontrol could not requeue job $job: submit again" >&2
fi
exit "$code"
