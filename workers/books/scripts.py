"""The ledger's state changes, each one atomic script on Redis 6.2. What goes out to others is in `outbox_scripts`."""

from __future__ import annotations

from typing import Final

from workers.books.prelude import PRELUDE
from workers.books.values import FIELDS

RING_LEASE_S: Final = 5
"""Whoever is to ring for a job has so long before another does."""

ACCEPT = f"""{PRELUDE}
local id, job, nonce, tenant, fetching = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7] == '1'
local once, digest, start_within = ARGV[8], ARGV[9], ARGV[10]
local hook, hook_events = ARGV[11], ARGV[12]
local cost, share, bound = tonumber(ARGV[13]), tonumber(ARGV[14]), tonumber(ARGV[15])
local pace, hour = tonumber(ARGV[16]), root .. 'accepted:' .. tenant .. ':' .. math.floor(now / 3600)
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
if pace and tonumber(redis.call('GET', hour) or 0) >= pace then
  return {{'over_pace', id, 0, math.ceil(3600 - now % 3600)}}
end
local mine = tonumber(redis.call('HGET', root .. 'load', tenant) or 0)
local all = tonumber(redis.call('GET', root .. 'load_total') or 0)
if share and mine > 0 and mine + cost > share then return {{'over_share', id, 0}} end
if bound and all > 0 and all + cost > bound then return {{'over_bound', id, 0}} end
if once ~= '' then redis.call('SET', root .. 'once:' .. once, digest .. ' ' .. id, 'EX', 86400) end
if pace then
  redis.call('INCR', hour)
  redis.call('EXPIRE', hour, 7200)
end
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
  post('fetches', tenant, id, now)
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

_PLACE = """
local function place_of(id, tenant)
  local rank = redis.call('ZRANK', root .. 'calling', id)
  if rank then return rank end
  local line = root .. 'line:' .. tenant
  local before = redis.call('ZRANK', line, id) or redis.call('ZCARD', line)
  local ahead = redis.call('ZCARD', root .. 'calling') + before
  for _, other in ipairs(redis.call('SMEMBERS', root .. 'lines')) do
    if other ~= tenant then ahead = ahead + math.min(before, redis.call('ZCARD', root .. 'line:' .. other)) end
  end
  return ahead
end
"""

LOOK = f"""
local root, fields, found = KEYS[1], {{{", ".join(f"'{name}'" for name in FIELDS)}}}, {{}}
{_PLACE}
for index, id in ipairs(ARGV) do
  local values = redis.call('HMGET', root .. 'job:' .. id, 'status', 'tenant', unpack(fields))
  local status, place, gone = values[1], false, false
  if status == 'queued' then
    place = place_of(id, values[2] or '')
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
