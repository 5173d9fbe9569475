"""What each of the ledger's scripts begins with: the keys, and what is done to them by more than one.

Keys under one root (a single Redis, not a cluster):

    job:<id>            hash: job, tenant, status, attempt, seq, times, token, nonces, progress, result, error, cost,
                        hook (URL), hook_events, hook:<n> and tries:<n> (a message that is to be sent)
    events:<id>         stream of what happened, numbered n-0
    preview:<id>        the newest small picture
    jobs[:<tenant>]     every known id by seq (order of acceptance)
    status:<status>[:<tenant>]   the ids in that state by seq
    line:<tenant>       queued ids that wait for a place in their tenant's window, by seq
    lines               set of tenants that have a line
    window:<tenant>     set of ids that are in RQ or running
    calling             queued ids in a window, for which RQ should hold a delivery, by seq
    to_ring             outbox: ids to be rung for, by the second from which they may be taken
    fetches:<tenant>, webhooks:<tenant>   outboxes, a line for each tenant: likewise
    turns:fetches, turns:webhooks   tenants with something in that outbox, by the second at which they were served last
                        or, if that is later, from which their next entry may be taken
    leases              running ids by the second at which their worker counts as lost
    deadlines           ids of which no step is made, by the second at which they expire
    expiring            ended ids by the second at which they are forgotten
    gone:<id>           the tenant of an ended job; it outlives the record by a week
    once:<digest>       the answer to an idempotency key
    accepted:<tenant>:<hour>     how many jobs of a tenant whose pace is bounded were accepted in that hour since 1970
    load, load_total    microseconds of the device that open jobs are estimated to take: by tenant, of all
    seq, fence          counters: acceptances, fencing tokens
    tally               what has happened so far, for metrics: ended:<status>; of the waits for a worker, and of the
                        cancels of running jobs, microseconds and counts by upper bound (see `census`)

Time is Redis' own. Accept and claim carry a nonce, all other changes of a running job its token: who resends after a
lost reply gets the first answer.
"""

from __future__ import annotations

from typing import Final

TALLY_BOUNDS_S: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
"""Upper bounds of the tally's durations."""

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

local function post(box, tenant, entry, due)
  redis.call('ZADD', root .. box .. ':' .. tenant, stamp(due), entry)
  redis.call('ZADD', root .. 'turns:' .. box, 'LT', stamp(due), tenant)
end
local function unpost(box, tenant, entry)
  local line = root .. box .. ':' .. tenant
  redis.call('ZREM', line, entry)
  if redis.call('EXISTS', line) == 0 then redis.call('ZREM', root .. 'turns:' .. box, tenant) end
end
local function next_turn(box, tenant, since)
  local head = redis.call('ZRANGE', root .. box .. ':' .. tenant, 0, 0, 'WITHSCORES')[2]
  if head then
    redis.call('ZADD', root .. 'turns:' .. box, stamp(math.max(since, tonumber(head))), tenant)
  else
    redis.call('ZREM', root .. 'turns:' .. box, tenant)
  end
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
    post('webhooks', tenant_of(id), 'msg_' .. id .. '_' .. number, now)
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
    if not first[1] then break end
    redis.call('SADD', open, first[1])
    redis.call('ZADD', root .. 'calling', first[2], first[1])
    redis.call('ZADD', root .. 'to_ring', stamp(now), first[1])
    set(first[1], 'queued_at', stamp(now))
  end
  redis.call(redis.call('EXISTS', line) == 1 and 'SADD' or 'SREM', root .. 'lines', tenant)
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
  drop(id, 'leases', 'calling', 'to_ring', 'deadlines', 'line:' .. tenant)
  unpost('fetches', tenant, id)
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
  local ancient = stamp(now - ttl - WEEK)
  for _, tenant in ipairs(redis.call('ZRANGEBYSCORE', root .. 'turns:webhooks', '-inf', ancient, 'LIMIT', 0, 100)) do
    redis.call('ZREMRANGEBYSCORE', root .. 'webhooks:' .. tenant, '-inf', ancient)
    next_turn('webhooks', tenant, now)
  end
end
"""
)
