import { describe, expect, it } from 'vitest'
import { Operation } from '../src/operation.ts'
import { COMMAND } from '../src/protocol.ts'
import { ReplyParser } from '../src/reply-parser.ts'
import type { Request } from '../src/request.ts'
import { patternDisk, u16, u32, u64 } from './fake-server.ts'

const disk = patternDisk(200)
const negotiated = {
  structuredReplies: true,
  metaContexts: new Map([[3, 'base:allocation']]),
  blockSize: { minimum: 1, preferred: 4096, maximum: 4096 },
  size: 200,
}

function chunk(cookie: number, type: number, isLast: boolean, ...payload: Buffer[]): Buffer {
  const body = Buffer.concat(payload)
  return Buffer.concat([u32(0x668e33ef), u16(isLast ? 1 : 0), u16(type), u64(cookie), u32(body.length), body])
}

/** Every kind of reply, with two of them mixed. */
const CONVERSATION = Buffer.concat([
  chunk(1, 1, false, u64(50), disk.subarray(50, 80)),
  chunk(2, 5, false, u32(3), u32(100), u32(0), u32(100), u32(3)),
  chunk(1, 2, false, u64(80), u32(20)),
  chunk(1, 1, true, u64(0), disk.subarray(0, 50)),
  chunk(2, 0, true),
  Buffer.concat([u32(0x67446698), u32(0), u64(3)]),
  chunk(4, 0x8001, true, u32(5), u16(3), Buffer.from('bad')),
])

/** Parses the conversation in pieces that end where `cuts` say, and tells all that came of it. */
function parse(cuts: readonly number[]): unknown {
  const memory = Buffer.alloc(100, 0xee)
  const make = (command: number, length: number, buffer?: Buffer) =>
    new Operation({
      command,
      flags: 0,
      offset: 0,
      length,
      maxRequest: length,
      ...(buffer && { buffer }),
    }).nextRequest()
  const requests = new Map<number, Request>([
    [1, make(COMMAND.read, 100, memory)],
    [2, make(COMMAND.blockStatus, 200)],
    [3, make(COMMAND.write, 10)],
    [4, make(COMMAND.trim, 10)],
  ])
  const done: [number, string][] = []
  const parser = new ReplyParser(negotiated, {
    find: cookie => requests.get(cookie),
    done: (cookie, request) => done.push([cookie, request.error?.errno ?? 'done']),
  })
  let start = 0
  for (const end of [...cuts, CONVERSATION.length]) {
    // A copy of its own, which is overwritten, as the memory of a socket is.
    const piece = Buffer.from(CONVERSATION.subarray(start, end))
    parser.push(piece, piece.length)
    piece.fill(0xdd)
    start = end
  }
  const status = requests.get(2)?.status?.get('base:allocation')
  return {
    done,
    memory: memory.toString('hex'),
    status: status && [...status.pairs.subarray(0, 2 * status.count)],
  }
}

const EXPECTED = {
  done: [
    [1, 'done'],
    [2, 'done'],
    [3, 'done'],
    [4, 'EIO'],
  ],
  memory: Buffer.concat([disk.subarray(0, 80), Buffer.alloc(20)]).toString('hex'),
  status: [100, 0, 100, 3],
}

describe('the reply parser', () => {
  it('understands replies that arrive at once', () => {
    expect(parse([])).toEqual(EXPECTED)
  })

  it('understands them byte by byte', () => {
    expect(parse(Array.from({ length: CONVERSATION.length }, (_, index) => index))).toEqual(EXPECTED)
  })

  it('understands them cut in two at every place, and in three at every two', () => {
    const expected = JSON.stringify(EXPECTED)
    const wrong: number[][] = []
    for (let first = 0; first < CONVERSATION.length; first++) {
      for (let second = first; second < CONVERSATION.length; second += 5) {
        const cuts = [first, second]
        if (JSON.stringify(parse(cuts)) !== expected) wrong.push(cuts)
      }
    }
    expect(wrong).toEqual([])
  })
})
