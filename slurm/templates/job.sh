#!/bin/bash
# {title}
# Written by `incubate submit`; edit [slurm] in the config rather than this file.
{options}

# From here on the script notes the early signal, TERM and INT, and passes each on to the child as USR2. The program then writes a
# checkpoint and ends with exit code 75. The child must not get TERM, because srun would then kill the ranks at once.
child='' stop_requested='' ended_by_slurm=''
pass_on() { [ -z "$child" ] || kill -s USR2 "$child" 2>/dev/null; }
trap 'stop_requested=1; pass_on' {signal}
# scancel, preemption and requeueing by Slurm send TERM. Slurm then decides whether the job comes back, so this script does not
# requeue it.
trap 'ended_by_slurm=1; pass_on' TERM INT

# If the job was submitted from within a step of another job, these variables would make it a part of that step. Your variables
# PMIX_MCA_* and OMPI_MCA_* stay.
for name in ${!PMI_@} ${!PMIX_@} ${!OMPI_COMM_@} ${!SLURM_STEP_@} ${!SLURM_STEPID@} ${!SLURM_CPU_BIND@} {array_variables}; do
  case $name in PMIX_MCA_*) ;; *) unset "$name" ;; esac
done

# If sbatch was told to export no variables, srun would export none either, and the ranks would lack the variables that the
# setup below sets.
unset SLURM_EXPORT_ENV

# `set -u` comes after the setup, since `module load` and conda read variables that are not set.
{setup}
set -u

program=({program})
config={config}
run_dir={run_dir}
max_requeues={max_requeues}
job={job}

# Starts the program with the given command and arguments, waits until it has ended, and returns its exit code. After a signal it
# starts nothing and returns 75.
step() {
  local code_of_last_wait
  [ -z "$stop_requested$ended_by_slurm" ] || return 75
  {launch} "${program[@]}" "$@" --run-dir "$run_dir" &
  child=$!
  # A signal that came before the child was known has not been passed on.
  [ -z "$stop_requested$ended_by_slurm" ] || pass_on
  # A trapped signal interrupts `wait`, which then returns more than 128. So wait again until the child is gone, and once more for
  # its exit code.
  while true; do
    wait "$child"
    code=$?
    [ "$code" -gt 128 ] || break
    kill -0 "$child" 2>/dev/null && continue
    wait "$child"
    code_of_last_wait=$?
    [ "$code_of_last_wait" = 127 ] || code=$code_of_last_wait
    break
  done
  child=
  # A signal that comes before the program has a handler ends the program. No work is lost, so this counts as a stop.
  [ -z "$stop_requested$ended_by_slurm" ] || [ "$code" != $((128 + $(kill -l USR2))) ] || code=75
  return "$code"
}

# Prints how many steps this job's phases have saved in all. By this number the script notices a start that has gained no step. A
# phase whose heartbeat still says «running» was lost with its node, so its steps do not count.
steps_saved() {
  local total=0 number
  for number in $(cd "$run_dir/progress" 2>/dev/null && grep -Ls '"state":"running"' {watched} |
    xargs -r grep -ho '"step":[0-9]*'); do
    total=$((total + ${number#*:}))
  done
  echo "$total"
}
steps_before=$(steps_saved)

code=0
{steps}

if [ "$code" = 75 ] && [ -z "$ended_by_slurm" ]; then
  count=${SLURM_RESTART_COUNT:-0}
  if [ "$count" -ge "$max_requeues" ]; then
    echo "incubate: stopped, and requeued $count times already: giving up" >&2
    exit 1
  fi
  if [ "$count" -gt 0 ] && [ "$(steps_saved)" -le "$steps_before" ]; then
    echo "incubate: stopped without a step gained since the last start: not requeued" >&2
    exit 1
  fi
  # A requeued job keeps its job ID, so the jobs that wait for it go on waiting.
  scontrol requeue "$job" && exit 0
  echo "incubate: stopped and resumable, but scontrol could not requeue job $job: submit again" >&2
fi
exit "$code"
