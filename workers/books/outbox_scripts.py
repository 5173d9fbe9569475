"""The ledger's outboxes: what a change of state wants done elsewhere is noted by its own script, so that no crash
between the two loses it. Who takes an entry leases it; what is not settled by then is taken again.

    to_ring    jobs that have entered their tenant's window ─▶ RQ
    fetches    jobs with references at URLs ─▶ the courier ─▶ their tenant's line
    webhooks   changes that a caller wants to be told of ─▶ the courier
"""

from __future__ import annotations

from workers.books.scripts import PRELUDE

_TAKE = f"""{PRELUDE}
local most, lease, taken = tonumber(ARGV[3]), tonumber(ARGV[4]), {{}}
local function due(box) return redis.call('ZRANGEBYSCORE', root .. box, '-inf', stamp(now), 'LIMIT', 0, most) end
local function hold(box, entry) redis.call('ZADD', root .. box, stamp(now + lease), entry) end
"""

TO_RING = f"""{_TAKE}
for _, id in ipairs(due('to_ring')) do
  hold('to_ring', id)
  table.insert(taken, id)
end
return taken
"""

WEBHOOKS = f"""{_TAKE}
for _, message in ipairs(due('webhooks')) do
  local id, number = string.match(message, '^msg_(.+)_(%d+)$')
  local said = get(id, 'hook:' .. number)
  if said then
    local fields = redis.call('HMGET', record(id), 'tenant', 'hook')
    local event, data = string.match(said, '^(%a+) (.*)$')
    local tries = redis.call('HINCRBY', record(id), 'tries:' .. number, 1)
    hold('webhooks', message)
    table.insert(taken, {{message, id, fields[1], tries, fields[2], event, data}})
  else
    drop(message, 'webhooks')
  end
end
return taken
"""
"""What is not told before its job is forgotten or deleted is not told any more."""

RETRY_WEBHOOK = f"""{PRELUDE}
return redis.call('ZADD', root .. 'webhooks', 'XX', 'CH', stamp(now + tonumber(ARGV[4])), ARGV[3])
"""

SETTLE_WEBHOOK = f"""{PRELUDE}
local message = ARGV[3]
local id, number = string.match(message, '^msg_(.+)_(%d+)$')
if id then redis.call('HDEL', record(id), 'hook:' .. number, 'tries:' .. number) end
drop(message, 'webhooks')
"""

FETCHES = f"""{_TAKE}
local tries, lost_error = tonumber(ARGV[5]), ARGV[6]
for _, id in ipairs(due('fetches')) do
  if get(id, 'status') ~= 'queued' then
    drop(id, 'fetches')
  elseif redis.call('HINCRBY', record(id), 'fetch_tries', 1) > tries then
    set(id, 'error', lost_error)
    finish(id, 'failed')
  else
    local token = redis.call('INCR', root .. 'fence')
    set(id, 'fetch_token', token)
    hold('fetches', id)
    table.insert(taken, {{id, token}})
  end
end
return taken
"""

RESOLVE = f"""{PRELUDE}
local id, token, job = ARGV[3], ARGV[4], ARGV[5]
if get(id, 'fetch_token') ~= token then return 0 end
if get(id, 'fetched') == '1' then return 1 end
if get(id, 'status') ~= 'queued' then return 0 end
local tenant = tenant_of(id)
set(id, 'job', job, 'fetched', '1')
drop(id, 'fetches')
redis.call('ZADD', root .. 'line:' .. tenant, get(id, 'seq'), id)
let_in(tenant)
return 1
"""

FAIL_FETCH = f"""{PRELUDE}
local id, token, error = ARGV[3], ARGV[4], ARGV[5]
if get(id, 'fetch_token') ~= token or get(id, 'fetched') == '1' then return 0 end
local status = get(id, 'status')
if status == 'failed' then return 1 end
if status ~= 'queued' then return 0 end
set(id, 'error', error)
finish(id, 'failed')
return 1
"""
