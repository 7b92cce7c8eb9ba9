-- wrk -s rotate.lua URL -- FOLDER COUNT: posts FOLDER/00.bin, 01.bin, ... in turns; the last line is one JSON object.
local requests, turn = {}, 0

function init(arguments)
  for index = 0, tonumber(arguments[2]) - 1 do
    local file = assert(io.open(string.format("%s/%02d.bin", arguments[1], index), "rb"))
    requests[index] = wrk.format("POST", nil, nil, file:read("*a"))
    file:close()
  end
end

function request()
  turn = (turn + 1) % (#requests + 1)
  return requests[turn]
end

function done(summary, latency)
  local errors = summary.errors
  local refused = errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format(
    '\n{"requests": %d, "seconds": %.4f, "p50_ms": %.3f, "p99_ms": %.3f, "bad_status": %d, "failed": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status, refused))
end
