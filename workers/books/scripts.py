"""The ledger's state changes, each one atomic script on Redis 6.2. What goes out to others is in `outbox_scripts`.

Keys under one root (a single Redis, not a cluster):

    job:<id>            hash: job, tenant, status, attempt, seq, times, token, nonces, progress, result, error, cost,
                        hook (URL), hook_events, hook:<n> and tries:<n> (a message that is to be sent)
    events:<id>         stream of what happened, numbered n-0
    preview:<id>        the newest small picture
    jobs[:<tenant>]     every known id by seq (order of acceptance)
    status:<status>[:<tenant>]   the ids in that state by seq
    line:<tenant>       queued ids that wait for a place in their tenant's window, by seq
    window:<tenant>     set of ids that are in RQ or running
    calling             queued ids in a window, for which RQ should hold a delivery, by seq
    to_ring, webhooks, fetches   outboxes: what is to be done, by the second from which it may be taken
    leases              running ids by the second at which their worker counts as lost
    deadlines           ids of which no step is made, by the second at which they expire
    expiring            ended ids by the second at which they are forgotten
    gone:<id>           the tenant of an ended job; it outlives the record by a week
    once:<digest>       the answer to an idempotency key
    load, load_total    microseconds of the device that open jobs are estimated to take: by tenant, of all
    seq, fence          counters: acceptances, fencing tokens
    tally               what has happened so far, for metrics: ended:<status>; of the waits for a worker, and of the
                        cancels of running jobs, microseconds and counts by upper bound (see `census`)

Time is Redis' own. Accept and claim carry a nonce, all other changes of a running job its token: who resends after a
lost reply gets the first answer.
"""

from __future__ import annotations

from typing import Final

from workers.books.values import FIELDS

TALLY_BOUNDS_S: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
"""Upper bounds of the tally's durations."""
RING_LEASE_S: Final = 5
"""Whoever is to ring for a job has so long before another does."""

PRELUDE = (
    f"local BOUNDS = {{{', '.join(map(str, TALLY_BOUNDS_S))}}}"
    + """
local root, ttl, window = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local WEEK, EVENTS = 604800, 200

local function stamp(seconds) return string.format('%.6f', seconds) end
local function record(id) return root .. 'job:' .. id end
local function get(id, field) return redis.call('HGET', record(id), field) end
local function set(id, ...) redis.call('HSET', record(id), ...) end
local function drop(id, ...) for _, key in ipairs({...}) do redis.call('ZREM', root .. key, id) end end
local function holds(id, token) return get(id, 'token') == token end
local function tenant_of(id) return get(id, 'tenant') or '' end
local function terminal(status) return status ~= 'queued' and status ~= 'running' end
local function took(what, seconds)
  local bound = 'inf'
  for _, most in ipairs(BOUNDS) do if seconds <= most then bound = most break end end
  redis.call('HINCRBY', root .. 'tally', what .. ':' .. bound, 1)
  redis.call('HINCRBY', root .. 'tally', what .. ':us', math.floor(seconds * 1e6))
end
local function taken_up(id)
  if redis.call('HSETNX', record(id), 'taken_up', 1) == 1 then took('wait', now - tonumber(get(id, 'created_at'))) end
end
local function late(id)
  local start_by = get(id, 'start_by')
  return start_by and now > tonumber(start_by) and not get(id, 'stepped')
end

local function tell(id, kind, data)
  local number = redis.call('HINCRBY', record(id), 'events', 1)
  redis.call('XADD', root .. 'events:' .. id, 'MAXLEN', EVENTS, number .. '-0', kind, data)
  return number
end

local function tell_status(id, status)
  local fields = redis.call('HMGET', record(id), 'attempt', 'hook_events')
  local data = '{"status":"' .. status .. '","attempt":' .. (fields[1] or 1) .. '}'
  local number, asked = tell(id, 'status', data), fields[2] or ''
  local event = terminal(status) and string.find(asked, 'terminal') and 'terminal'
    or string.find(asked, 'status') and 'status'
  if event then
    set(id, 'hook:' .. number, event .. ' ' .. data)
    redis.call('ZADD', root .. 'webhooks', stamp(now), 'msg_' .. id .. '_' .. number)
  end
end

local function file(id, seq, status, tenant)
  redis.call('ZADD', root .. 'status:' .. status, seq, id)
  redis.call('ZADD', root .. 'status:' .. status .. ':' .. tenant, seq, id)
  set(id, 'status', status)
  tell_status(id, status)
end

local function move(id, to)
  local from, seq, tenant = get(id, 'status'), get(id, 'seq'), tenant_of(id)
  drop(id, 'status:' .. from, 'status:' .. from .. ':' .. tenant)
  file(id, seq, to, tenant)
end

local function let_in(tenant)
  local line, open = root .. 'line:' .. tenant, root .. 'window:' .. tenant
  while redis.call('SCARD', open) < window do
    local first = redis.call('ZPOPMIN', line)
    if not first[1] then return end
    redis.call('SADD', open, first[1])
    redis.call('ZADD', root .. 'calling', first[2], first[1])
    redis.call('ZADD', root .. 'to_ring', stamp(now), first[1])
    set(first[1], 'queued_at', stamp(now))
  end
end

local function weigh(tenant, cost)
  if cost == 0 then return end
  redis.call('INCRBY', root .. 'load_total', cost)
  if redis.call('HINCRBY', root .. 'load', tenant, cost) <= 0 then redis.call('HDEL', root .. 'load', tenant) end
end

local function finish(id, to)
  local tenant = tenant_of(id)
  move(id, to)
  set(id, 'finished_at', stamp(now))
  redis.call('HINCRBY', root .. 'tally', 'ended:' .. to, 1)
  local asked = to == 'canceled' and get(id, 'cancel_at')
  if asked then took('cancel', now - tonumber(asked)) end
  drop(id, 'leases', 'calling', 'to_ring', 'deadlines', 'fetches', 'line:' .. tenant)
  redis.call('SREM', root .. 'window:' .. tenant, id)
  weigh(tenant, 0 - tonumber(get(id, 'cost') or 0))
  redis.call('ZADD', root .. 'expiring', stamp(now + ttl), id)
  redis.call('EXPIRE', record(id), ttl)
  redis.call('EXPIRE', root .. 'events:' .. id, ttl)
  redis.call('EXPIRE', root .. 'preview:' .. id, math.min(ttl, 60))
  redis.call('SET', root .. 'gone:' .. id, tenant, 'EX', ttl + WEEK)
  let_in(tenant)
end

local function requeue(id)
  drop(id, 'leases')
  redis.call('HDEL', record(id), 'token', 'claim_nonce', 'worker', 'progress', 'started_at', 'waits')
  redis.call('DEL', root .. 'preview:' .. id)
  set(id, 'queued_at', stamp(now))
  redis.call('ZADD', root .. 'calling', get(id, 'seq'), id)
  if late(id) then redis.call('ZADD', root .. 'deadlines', stamp(now), id) end
  move(id, 'queued')
end

local function erase(id, tenant)
  redis.call('DEL', record(id), root .. 'events:' .. id, root .. 'preview:' .. id)
  drop(id, 'expiring', 'jobs', 'jobs:' .. tenant)
  for _, status in ipairs({'succeeded', 'failed', 'canceled', 'expired'}) do
    drop(id, 'status:' .. status, 'status:' .. status .. ':' .. tenant)
  end
end

local function forget()
  local old = redis.call('ZRANGEBYSCORE', root .. 'expiring', '-inf', stamp(now), 'LIMIT', 0, 100)
  for _, id in ipairs(old) do erase(id, redis.call('GET', root .. 'gone:' .. id) or '') end
  redis.call('ZREMRANGEBYSCORE', root .. 'webhooks', '-inf', stamp(now - ttl - WEEK))
end
"""
)

ACCEPT = f"""{PRELUDE}
local id, job, nonce, tenant, fetching = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7] == '1'
local once, digest, start_within = ARGV[8], ARGV[9], ARGV[10]
local hook, hook_events = ARGV[11], ARGV[12]
local cost, share, bound = tonumber(ARGV[13]), tonumber(ARGV[14]), tonumber(ARGV[15])
local function called() return redis.call('ZSCORE', root .. 'calling', id) and 1 or 0 end
if redis.call('EXISTS', record(id), root .. 'gone:' .. id) > 0 then
  return {{get(id, 'accept_nonce') == nonce and 'new' or 'known', id, called()}}
end
if once ~= '' then
  local kept = redis.call('GET', root .. 'once:' .. once)
  if kept then
    local first_digest, first_id = string.match(kept, '^(%S*) (%S+)$')
    return {{first_digest == digest and 'replayed' or 'conflict', first_id, 0}}
  end
end
local mine = tonumber(redis.call('HGET', root .. 'load', tenant) or 0)
local all = tonumber(redis.call('GET', root .. 'load_total') or 0)
if share and mine > 0 and mine + cost > share then return {{'over_share', id, 0}} end
if bound and all > 0 and all + cost > bound then return {{'over_bound', id, 0}} end
if once ~= '' then redis.call('SET', root .. 'once:' .. once, digest .. ' ' .. id, 'EX', 86400) end
local seq = redis.call('INCR', root .. 'seq')
set(id, 'job', job, 'tenant', tenant, 'attempt', 1, 'seq', seq, 'accept_nonce', nonce, 'created_at', stamp(now),
    'cost', cost)
if start_within ~= '' then
  set(id, 'start_by', stamp(now + tonumber(start_within)))
  redis.call('ZADD', root .. 'deadlines', stamp(now + tonumber(start_within)), id)
end
if hook ~= '' then set(id, 'hook', hook, 'hook_events', hook_events) end
weigh(tenant, cost)
redis.call('ZADD', root .. 'jobs', seq, id)
redis.call('ZADD', root .. 'jobs:' .. tenant, seq, id)
file(id, seq, 'queued', tenant)
if fetching then
  redis.call('ZADD', root .. 'fetches', stamp(now), id)
else
  redis.call('ZADD', root .. 'line:' .. tenant, seq, id)
  let_in(tenant)
end
if called() == 1 then redis.call('ZADD', root .. 'to_ring', stamp(now + {RING_LEASE_S}), id) end
return {{'new', id, called()}}
"""

CLAIM = f"""{PRELUDE}
local id, worker, nonce, lease, waits = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6]), ARGV[7] == '1'
local status = get(id, 'status')
if status == 'running' and get(id, 'claim_nonce') == nonce then return tonumber(get(id, 'token')) end
if status ~= 'queued' or not redis.call('ZSCORE', root .. 'calling', id) then return 0 end
if late(id) then
  finish(id, 'expired')
  return 0
end
local token = redis.call('INCR', root .. 'fence')
drop(id, 'calling', 'to_ring')
move(id, 'running')
set(id, 'token', token, 'claim_nonce', nonce, 'worker', worker, 'started_at', stamp(now))
if waits then set(id, 'waits', '1') else taken_up(id) end
redis.call('ZADD', root .. 'leases', stamp(now + lease), id)
return token
"""

BEGIN = f"""{PRELUDE}
local id, token = ARGV[3], ARGV[4]
if get(id, 'status') ~= 'running' or not holds(id, token) then return 0 end
redis.call('HDEL', record(id), 'waits')
taken_up(id)
return 1
"""

BEAT = f"""{PRELUDE}
local id, token, progress, lease, stepped, preview = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6]), ARGV[7], ARGV[8]
if get(id, 'status') ~= 'running' or not holds(id, token) then return 'lost' end
if progress ~= '' and get(id, 'progress') ~= progress then
  set(id, 'progress', progress)
  tell(id, 'progress', progress)
end
if stepped == '1' and not get(id, 'stepped') then
  set(id, 'stepped', '1')
  drop(id, 'deadlines')
end
if preview ~= '' then
  redis.call('SET', root .. 'preview:' .. id, preview)
  tell(id, 'preview', progress ~= '' and progress or '{{}}')
end
redis.call('ZADD', root .. 'leases', stamp(now + lease), id)
if get(id, 'cancel_requested') == '1' then return 'canceled' end
return late(id) and 'expired' or 'ok'
"""

END = f"""{PRELUDE}
local id, token, to, field, value = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
if not holds(id, token) then return 0 end
local status = get(id, 'status')
if status == to then return 1 end
if status ~= 'running' then return 0 end
if to == 'canceled' and get(id, 'cancel_requested') ~= '1' then return 0 end
if to == 'expired' and not late(id) then return 0 end
if field ~= '' then set(id, field, value) end
finish(id, to)
return 1
"""
"""Commit, fail and release: a token that no longer holds is refused, one's own repeated call is not."""

HAND_BACK = f"""{PRELUDE}
local id, token = ARGV[3], ARGV[4]
if get(id, 'handed_back') == token then return 1 end
if get(id, 'status') ~= 'running' or not holds(id, token) then return 0 end
set(id, 'handed_back', token)
if get(id, 'cancel_requested') == '1' then
  redis.call('HDEL', record(id), 'token', 'claim_nonce')
  finish(id, 'canceled')
else
  requeue(id)
end
return 1
"""
"""Running → queued by a worker that leaves, or canceled if that was asked for: no attempt is charged."""

CANCEL = f"""{PRELUDE}
local id = ARGV[3]
local status = get(id, 'status')
if not status then return false end
if terminal(status) then return redis.call('HGETALL', record(id)) end
set(id, 'cancel_requested', '1')
if status == 'queued' or get(id, 'waits') then
  redis.call('HDEL', record(id), 'token', 'claim_nonce')
  finish(id, 'canceled')
else
  redis.call('HSETNX', record(id), 'cancel_at', stamp(now))
end
return redis.call('HGETALL', record(id))
"""
"""What runs ends at its next beat. What only waits with a worker ends at once: `begin` tells the worker, or a beat."""

REAP = f"""{PRELUDE}
local most, lost_error, requeued = tonumber(ARGV[3]), ARGV[4], {{}}
local due = redis.call('ZRANGEBYSCORE', root .. 'leases', '-inf', stamp(now), 'LIMIT', 0, 100)
for _, id in ipairs(due) do
  drop(id, 'leases')
  if get(id, 'status') == 'running' then
    local waits = get(id, 'waits')
    redis.call('HDEL', record(id), 'token', 'claim_nonce')
    if get(id, 'cancel_requested') == '1' then
      finish(id, 'canceled')
    elseif not waits and tonumber(get(id, 'attempt')) >= most then
      set(id, 'error', lost_error)
      finish(id, 'failed')
    else
      if not waits then redis.call('HINCRBY', record(id), 'attempt', 1) end
      requeue(id)
      table.insert(requeued, id)
    end
  end
end
forget()
return requeued
"""
"""Only what had begun is charged: what waited for its turn cannot have killed the worker."""

EXPIRE = f"""{PRELUDE}
local expired = {{}}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', root .. 'deadlines', '-inf', stamp(now), 'LIMIT', 0, 100)) do
  local status = get(id, 'status')
  if status == 'queued' then
    finish(id, 'expired')
    table.insert(expired, id)
  elseif status == 'running' then
    redis.call('ZADD', root .. 'deadlines', stamp(now + 1), id)
  else
    drop(id, 'deadlines')
  end
end
return expired
"""
"""A running one is its worker's affair, which hears of it at its next beat; another look follows in a second."""

DELETE = f"""{PRELUDE}
local id = ARGV[3]
local tenant, status = tenant_of(id), get(id, 'status')
if not status then return redis.call('EXISTS', root .. 'gone:' .. id) end
if not terminal(status) then return 0 end
erase(id, tenant)
redis.call('SET', root .. 'gone:' .. id, tenant, 'EX', WEEK)
return 1
"""

WAITING = f"""{PRELUDE}
local age, waiting = tonumber(ARGV[3]), {{}}
for _, id in ipairs(redis.call('ZRANGE', root .. 'calling', 0, 199)) do
  local queued_at = tonumber(get(id, 'queued_at') or '')
  if queued_at and queued_at <= now - age then table.insert(waiting, id) end
end
return waiting
"""

LOOK = f"""
local root, fields, found = KEYS[1], {{{", ".join(f"'{name}'" for name in FIELDS)}}}, {{}}
for index, id in ipairs(ARGV) do
  local values = redis.call('HMGET', root .. 'job:' .. id, 'status', 'tenant', unpack(fields))
  local status, line, place, gone = values[1], root .. 'line:' .. (values[2] or ''), false, false
  if status == 'queued' then
    place = redis.call('ZRANK', root .. 'calling', id)
      or redis.call('ZCARD', root .. 'calling') + (redis.call('ZRANK', line, id) or redis.call('ZCARD', line))
  elseif not status then
    gone = redis.call('GET', root .. 'gone:' .. id)
  end
  found[index] = {{place, gone, values}}
end
return found
"""
"""For many jobs at once: the place of a queued one, whose it was if it is gone, and its record."""

ENDED = f"""{PRELUDE}
return redis.call('ZCOUNT', root .. 'expiring', stamp(now + ttl - tonumber(ARGV[3])), '+inf')
"""
