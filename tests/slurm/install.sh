#!/usr/bin/env bash
# Installs what tests/slurm needs, SLURM and MUNGE, on Debian or Ubuntu as root. The tests start the daemons themselves, from a
# configuration of their own. CI runs this; on your machine it is up to you (without SLURM these tests are skipped).
set -euo pipefail
missing=()
for program in slurmctld slurmd sbatch srun munged; do command -v "$program" >/dev/null || missing+=("$program"); done
((${#missing[@]} == 0)) && exit 0
((EUID == 0)) || { echo "install.sh: ${missing[*]} missing, and installing needs root" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "install.sh: ${missing[*]} missing, and there is no apt-get: install SLURM >= 22.05 and MUNGE" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurm-wlm munge procps >/dev/null
