// Uploads in a process of its own, and tells how much memory that took; see s3-driver.lab.test.ts.
import { readFileSync } from 'node:fs'
import { Readable } from 'node:stream'
import { S3Driver, type S3DriverOptions } from '@varve/driver-s3'

const MIB = 1024 * 1024
const BODY_SIZE = 100 * MIB
const STREAM_SIZE = 240 * MIB

/** The same MiB again and again, so that the source itself takes no memory. */
const block = Buffer.alloc(MIB, 0x5a)
function source(bytes: number): Readable {
  function* blocks() {
    for (let left = bytes; left > 0; left -= MIB) yield block.subarray(0, left)
  }
  return Readable.from(blocks(), { objectMode: false, highWaterMark: 1 })
}

function memory(field: 'VmRSS' | 'VmHWM'): number {
  const [, kibibytes] =
    new RegExp(`${field}:\\s+(\\d+)`).exec(readFileSync('/proc/self/status', 'utf8')) ?? []
  return Number(kibibytes) * 1024
}

const { VARVE_TEST = '' } = process.env
const options: S3DriverOptions = JSON.parse(VARVE_TEST)
await using bodies = new S3Driver({ ...options, partSize: 50 * MIB })
await using streams = new S3Driver({ ...options, maxParts: 20 })
await bodies.put('small', source(1000)) // loads what an upload needs

const idle = memory('VmRSS')
await bodies.put('body', {
  size: BODY_SIZE,
  replayable: true,
  open: ({ start, end } = { start: 0, end: BODY_SIZE }) => source(end - start),
})
const body = memory('VmHWM') - idle
// parts of 8, 16, 32, 64 and then 96 MiB, which a stream has of several hundred GiB
await streams.put('stream', source(STREAM_SIZE))
const stream = memory('VmHWM') - idle
console.log(JSON.stringify({ body: body / MIB, stream: stream / MIB }))
