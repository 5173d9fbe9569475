"""The ledger's state changes, each one atomic script on Redis 6.2.

Keys under one root (a single Redis, not a cluster):

    job:<id>         hash: job, status, attempt, seq, times, token, nonces, progress, result, error
    jobs             every known id by seq (order of acceptance)
    status:<status>  the ids in that state by seq; `status:queued` is the line
    leases           running ids by the second at which their worker counts as lost
    expiring         ended ids by the second at which they are forgotten
    seq, fence       counters: acceptances, fencing tokens

Time is Redis' own. Accept and claim carry a nonce: who resends after a lost reply gets the first answer.
"""

from __future__ import annotations

_PRELUDE = """
local root, ttl = KEYS[1], tonumber(ARGV[1])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6

local function stamp(seconds) return string.format('%.6f', seconds) end
local function record(id) return root .. 'job:' .. id end
local function get(id, field) return redis.call('HGET', record(id), field) end
local function set(id, ...) redis.call('HSET', record(id), ...) end
local function holds(id, token) return get(id, 'token') == token end

local function move(id, to)
  local seq = get(id, 'seq')
  redis.call('ZREM', root .. 'status:' .. get(id, 'status'), id)
  redis.call('ZADD', root .. 'status:' .. to, seq, id)
  set(id, 'status', to)
end

local function finish(id, to)
  move(id, to)
  set(id, 'finished_at', stamp(now))
  redis.call('ZREM', root .. 'leases', id)
  redis.call('ZADD', root .. 'expiring', stamp(now + ttl), id)
  redis.call('EXPIRE', record(id), ttl)
end

local function requeue(id)
  redis.call('ZREM', root .. 'leases', id)
  redis.call('HDEL', record(id), 'token', 'claim_nonce', 'worker', 'progress', 'started_at')
  set(id, 'queued_at', stamp(now))
  move(id, 'queued')
end

local function forget()
  local old = redis.call('ZRANGEBYSCORE', root .. 'expiring', '-inf', stamp(now), 'LIMIT', 0, 100)
  for _, id in ipairs(old) do
    redis.call('DEL', record(id))
    for _, index in ipairs({'expiring', 'jobs', 'status:succeeded', 'status:failed', 'status:canceled'}) do
      redis.call('ZREM', root .. index, id)
    end
  end
end
"""

ACCEPT = f"""{_PRELUDE}
local id, job, nonce = ARGV[2], ARGV[3], ARGV[4]
if redis.call('EXISTS', record(id)) == 1 then
  return get(id, 'accept_nonce') == nonce and 1 or 0
end
local seq = redis.call('INCR', root .. 'seq')
set(id, 'job', job, 'status', 'queued', 'attempt', 1, 'seq', seq, 'accept_nonce', nonce,
    'created_at', stamp(now), 'queued_at', stamp(now))
redis.call('ZADD', root .. 'jobs', seq, id)
redis.call('ZADD', root .. 'status:queued', seq, id)
forget()
return 1
"""

CLAIM = f"""{_PRELUDE}
local id, worker, nonce, lease = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local status = get(id, 'status')
if status == 'running' and get(id, 'claim_nonce') == nonce then return tonumber(get(id, 'token')) end
if status ~= 'queued' then return 0 end
local token = redis.call('INCR', root .. 'fence')
move(id, 'running')
set(id, 'token', token, 'claim_nonce', nonce, 'worker', worker, 'started_at', stamp(now))
redis.call('ZADD', root .. 'leases', stamp(now + lease), id)
return token
"""

BEAT = f"""{_PRELUDE}
local id, token, progress, lease = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
if get(id, 'status') ~= 'running' or not holds(id, token) then return 'lost' end
if progress ~= '' then set(id, 'progress', progress) end
redis.call('ZADD', root .. 'leases', stamp(now + lease), id)
return get(id, 'cancel_requested') == '1' and 'canceled' or 'ok'
"""

END = f"""{_PRELUDE}
local id, token, to, field, value = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
if not holds(id, token) then return 0 end
local status = get(id, 'status')
if status == to then return 1 end
if status ~= 'running' then return 0 end
if to == 'canceled' and get(id, 'cancel_requested') ~= '1' then return 0 end
if field ~= '' then set(id, field, value) end
finish(id, to)
return 1
"""
"""Commit, fail and release: a token that no longer holds is refused, one's own repeated call is not."""

HAND_BACK = f"""{_PRELUDE}
local id, token = ARGV[2], ARGV[3]
if get(id, 'status') ~= 'running' or not holds(id, token) then return 0 end
if get(id, 'cancel_requested') == '1' then
  redis.call('HDEL', record(id), 'token', 'claim_nonce')
  finish(id, 'canceled')
else
  requeue(id)
end
return 1
"""
"""Running → queued by a worker that leaves, or canceled if that was asked for: no attempt is charged.

Asked again, it finds no token that holds."""

CANCEL = f"""{_PRELUDE}
local id = ARGV[2]
local status = get(id, 'status')
if not status then return false end
if status == 'queued' then
  set(id, 'cancel_requested', '1')
  finish(id, 'canceled')
elseif status == 'running' then
  set(id, 'cancel_requested', '1')
end
return redis.call('HGETALL', record(id))
"""

REAP = f"""{_PRELUDE}
local most, lost_error, requeued = tonumber(ARGV[2]), ARGV[3], {{}}
local due = redis.call('ZRANGEBYSCORE', root .. 'leases', '-inf', stamp(now), 'LIMIT', 0, 100)
for _, id in ipairs(due) do
  redis.call('ZREM', root .. 'leases', id)
  if get(id, 'status') == 'running' then
    redis.call('HDEL', record(id), 'token', 'claim_nonce')
    if get(id, 'cancel_requested') == '1' then
      finish(id, 'canceled')
    elseif tonumber(get(id, 'attempt')) >= most then
      set(id, 'error', lost_error)
      finish(id, 'failed')
    else
      redis.call('HINCRBY', record(id), 'attempt', 1)
      requeue(id)
      table.insert(requeued, id)
    end
  end
end
forget()
return requeued
"""

WAITING = f"""{_PRELUDE}
local age, waiting = tonumber(ARGV[2]), {{}}
for _, id in ipairs(redis.call('ZRANGE', root .. 'status:queued', 0, 199)) do
  local queued_at = tonumber(get(id, 'queued_at') or '')
  if queued_at and queued_at <= now - age then table.insert(waiting, id) end
end
return waiting
"""
