#!/bin/sh
# Starts Redis as the registry wants it: with the users of users.acl, and never evicting what it holds.
#
#   start.sh [ARGUMENT...]   write the users, then run redis-server with these arguments
#   start.sh --users         write the users again, after a password has changed; then: redis-cli ACL LOAD
#
# REDIS_SECRETS_DIR (/run/secrets) holds redis_default_password, redis_learner_password, redis_server_password and
# redis_operator_password; REDIS_USERS_FILE (/tmp/users.acl) is written. A password file may have two lines: during a
# rotation the old password and the new one both count. No password stands in an argument, in the environment or,
# unhashed, in a file of Redis.
set -eu
umask 077
secrets=${REDIS_SECRETS_DIR:-/run/secrets}
users=${REDIS_USERS_FILE:-/tmp/users.acl}

hashes() {
  while IFS= read -r password || [ -n "$password" ]; do
    if [ "${#password}" -lt 16 ]; then
      echo "start.sh: $1: a password has less than 16 characters; make one with: openssl rand -hex 32" >&2
      exit 78
    fi
    digest=$(printf %s "$password" | sha256sum)
    printf '#%s ' "${digest%% *}"
  done <"$1"
}

script=
for name in default learner server operator; do
  file=$secrets/redis_${name}_password
  if [ ! -s "$file" ]; then
    echo "start.sh: $file is missing or empty; put the password of the Redis user $name there" >&2
    exit 78
  fi
  found=$(hashes "$file")
  script="$script;s/{$name}/$found/"
done

# Continued lines start with a space. Redis reads a new file, never half of one.
sed -e "/^#/d;/^\$/d${script}" "$(dirname "$0")/users.acl" |
  awk '/^user/ && NR > 1 { print "" } { printf "%s", $0 } END { print "" }' >"$users.new"
mv "$users.new" "$users"

[ "${1-}" = --users ] && exit 0
exec "${REDIS_SERVER:-redis-server}" "$@" --aclfile "$users" --maxmemory-policy noeviction
