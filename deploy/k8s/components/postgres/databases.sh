#!/bin/sh
# Runs once, on an empty volume: each service gets a database and a role of its own. Passwords come from files.
set -eu
for service in intake bureau; do
  psql --username postgres --set ON_ERROR_STOP=1 <<SQL
\\set password \`cat /secrets/$service\`
CREATE ROLE $service LOGIN PASSWORD :'password';
CREATE DATABASE $service OWNER $service;
SQL
done
