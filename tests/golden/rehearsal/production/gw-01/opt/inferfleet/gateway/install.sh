#!/bin/sh
# Managed by inferfleet. Makes the gateway's environment from the wheels here, beside the one in
# use, and changes over when it is whole. --check only tells whether that is done.
# native
set -eu
export LC_ALL=C
umask 022  # the gateway's user reads what is made here
cd /opt/inferfleet/gateway
wanted=$(cat install.sh pins.txt wheels/*.whl | sha256sum | cut -c -16)
before=$(readlink current || true)
works() { "$1/bin/python" -c 'import inferfleet.gateway' 2>/dev/null; }

if [ "$before" = "$wanted" ] && [ -e "$wanted/complete" ] && works "$wanted"; then
  exit 0
elif [ "${1:-}" = --check ]; then
  echo "$wanted is wanted, ${before:-nothing} is here" >&2
  exit 1
fi

rm -rf "$wanted"
python3 -m venv "$wanted"
"$wanted/bin/python" -m pip install --constraint pins.txt --find-links wheels \
  --only-binary :all: --no-cache-dir --quiet --disable-pip-version-check inferfleet-gateway==0.1.0
touch "$wanted/complete"
rm -rf current.new
ln -s "$wanted" current.new
mv -T current.new current
# What serves may still run from the one before.
for old in */; do
  case ${old%/} in wheels | current | "$wanted" | "${before:-wheels}") ;; *) rm -rf "${old%/}" ;; esac
done
