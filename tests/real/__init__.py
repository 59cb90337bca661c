"""Runs on real programs: redis, lua and memcached, fetched and built by the tests themselves (`make real`)."""
