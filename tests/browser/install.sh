#!/usr/bin/env bash
# Installs what tests/browser needs, Chromium, on Debian or Ubuntu as root. CI runs this; on your machine it is up to you (without
# a Chromium these tests are skipped).
set -euo pipefail
for program in chromium chromium-browser google-chrome; do command -v "$program" >/dev/null && exit 0; done
((EUID == 0)) || { echo "install.sh: chromium missing, and installing needs root" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "install.sh: chromium missing, and there is no apt-get: install Chromium" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
