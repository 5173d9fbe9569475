"""The ledger's outboxes: what a change of state wants done elsewhere is noted by its own script, so that no crash
between the two loses it. Who takes an entry leases it; what is not settled by then is taken again.

    to_ring    jobs that have entered their tenant's window ─▶ RQ
    fetches    jobs with references at URLs ─▶ the courier ─▶ their tenant's line
    webhooks   changes that a caller wants to be told of ─▶ the courier

What the courier takes, it takes from one tenant after the other, who was served longest ago first: a tenant's thousand
entries stand before its own next one, and before one of each other tenant.
"""

from __future__ import annotations

from workers.books.prelude import PRELUDE

TO_RING = f"""{PRELUDE}
local most, lease = tonumber(ARGV[3]), tonumber(ARGV[4])
local due = redis.call('ZRANGEBYSCORE', root .. 'to_ring', '-inf', stamp(now), 'LIMIT', 0, most)
for _, id in ipairs(due) do redis.call('ZADD', root .. 'to_ring', stamp(now + lease), id) end
return due
"""

_SERVE = f"""{PRELUDE}
local left, lease, part, held = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), cjson.decode(ARGV[6])
local taken, served = {{}}, now

local function take_over(box)
  for _, entry in ipairs(redis.call('ZRANGE', root .. box, 0, 99)) do
    local id = string.match(entry, '^msg_(.+)_%d+$') or entry
    post(box, tenant_of(id), entry, tonumber(redis.call('ZSCORE', root .. box, entry)))
    drop(entry, box)
  end
end

local function lease_first(box, tenant, hand)
  local line = root .. box .. ':' .. tenant
  local entry = redis.call('ZRANGEBYSCORE', line, '-inf', stamp(now), 'LIMIT', 0, 1)[1]
  if entry then
    left, served = left - 1, served + 1e-6
    redis.call('ZADD', line, stamp(now + lease), entry)
    if hand(entry, tenant) then held[tenant] = (held[tenant] or 0) + 1 else unpost(box, tenant, entry) end
  end
  next_turn(box, tenant, served)
  return entry
end

local function go_round(box, tenants, hand)
  local more = {{}}
  for _, tenant in ipairs(tenants) do
    local may = left > 0 and (held[tenant] or 0) < part
    if may and lease_first(box, tenant, hand) then table.insert(more, tenant) end
  end
  return more
end

local function serve(box, hand)
  take_over(box)
  local full = 0
  for _, number in pairs(held) do if number >= part then full = full + 1 end end
  local turns = root .. 'turns:' .. box
  local tenants = redis.call('ZRANGEBYSCORE', turns, '-inf', stamp(now), 'LIMIT', 0, left + full)
  while left > 0 and tenants[1] do tenants = go_round(box, tenants, hand) end
end
"""
"""`serve` lets `hand` put what a courier gets into `taken`, at most `part` for each tenant with what it has `held`;
what `hand` says no to is dropped. Who is served is noted a microsecond apart, so that the next call goes on where this
one ended. `take_over` is for what a version without lines for tenants has left.
"""

WEBHOOKS = f"""{_SERVE}
serve('webhooks', function(message, tenant)
  local id, number = string.match(message, '^msg_(.+)_(%d+)$')
  local said = id and get(id, 'hook:' .. number)
  if not said then return false end
  local event, data = string.match(said, '^(%a+) (.*)$')
  local tries = redis.call('HINCRBY', record(id), 'tries:' .. number, 1)
  table.insert(taken, {{message, id, tenant, tries, get(id, 'hook'), event, data}})
  return true
end)
return taken
"""
"""What is not told before its job is forgotten or deleted is not told any more."""

_SENDER = f"""{PRELUDE}
local function sender_of(message)
  local id = string.match(message, '^msg_(.+)_%d+$') or ''
  return get(id, 'tenant') or redis.call('GET', root .. 'gone:' .. id) or ''
end
"""

RETRY_WEBHOOK = f"""{_SENDER}
local message, due = ARGV[3], now + tonumber(ARGV[4])
local tenant = sender_of(message)
if redis.call('ZSCORE', root .. 'webhooks:' .. tenant, message) then post('webhooks', tenant, message, due) end
"""

SETTLE_WEBHOOK = f"""{_SENDER}
local message = ARGV[3]
local id, number = string.match(message, '^msg_(.+)_(%d+)$')
if id then redis.call('HDEL', record(id), 'hook:' .. number, 'tries:' .. number) end
unpost('webhooks', sender_of(message), message)
"""

FETCHES = f"""{_SERVE}
local tries, lost_error = tonumber(ARGV[7]), ARGV[8]
serve('fetches', function(id, tenant)
  if get(id, 'status') ~= 'queued' or get(id, 'fetched') == '1' then return false end
  if redis.call('HINCRBY', record(id), 'fetch_tries', 1) > tries then
    set(id, 'error', lost_error)
    finish(id, 'failed')
    return false
  end
  local token = redis.call('INCR', root .. 'fence')
  set(id, 'fetch_token', token)
  table.insert(taken, {{id, token, tenant}})
  return true
end)
return taken
"""

RESOLVE = f"""{PRELUDE}
local id, token, job = ARGV[3], ARGV[4], ARGV[5]
if get(id, 'fetch_token') ~= token then return 0 end
if get(id, 'fetched') == '1' then return 1 end
if get(id, 'status') ~= 'queued' then return 0 end
local tenant = tenant_of(id)
set(id, 'job', job, 'fetched', '1')
unpost('fetches', tenant, id)
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
