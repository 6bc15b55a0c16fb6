import { once } from 'node:events'
import { setImmediate as turn } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { CLUSTER, DISK, dataStream, take } from './data-stream.ts'

test('a chunk that was given back is used for the next read, one that was not never is', async () => {
  const { image, guest, stream } = dataStream({ readAhead: 1 })
  const chunks: Buffer[] = []
  for (let i = 0; i < 20; i++) {
    if (i === 0) stream.read()
    guest.at(i).complete()
    const chunk = await take(stream)
    chunks.push(chunk)
    if (i % 2 === 1) image.recycle(chunk)
    await turn()
  }
  const memories = guest.reads.map(read => read.into.buffer)
  for (let i = 0; i < 20; i++) {
    const again = memories.indexOf(chunks[i]?.buffer ?? new ArrayBuffer(0), i + 1)
    if (i % 2 === 0) expect(again).toBe(-1)
    else if (i < 17) expect(again).toBeGreaterThan(i) // reads for the last ones have not begun
  }
  expect(chunks[0]?.equals(DISK.subarray(0, CLUSTER))).toBe(true)
  stream.destroy()
})

test('a chunk given back twice is lent once, and memory that is not of the stream is left alone', async () => {
  const { image, guest, stream } = dataStream({ readAhead: 1 })
  stream.read()
  guest.at(0).complete()
  const chunk = await take(stream)
  image.recycle(chunk.subarray(10, 20)) // any part of it means the whole
  image.recycle(chunk)
  image.recycle(Buffer.allocUnsafeSlow(CLUSTER))
  stream.destroy()
  guest.at(1).fail(new Error('cancelled'))
  await turn()
  const again = image.stream({ start: 4 * CLUSTER, chunkSize: CLUSTER, readAhead: 6 })
  const before = guest.reads.length
  again.read()
  await turn()
  const memories = guest.reads.slice(before).map(read => read.into.buffer)
  expect(new Set(memories).size).toBe(memories.length)
  again.destroy()
})

test('memory is lent again for chunks of the same size only', async () => {
  const { image, guest, stream, layout } = dataStream({ readAhead: 1 })
  stream.read()
  guest.at(0).complete()
  const chunk = await take(stream)
  image.recycle(chunk)
  stream.destroy()
  const larger = image.stream({ start: layout.dataStart, chunkSize: 2 * CLUSTER, readAhead: 1 })
  larger.read()
  expect(guest.reads.at(-1)?.into.buffer.byteLength).toBe(2 * CLUSTER)
  larger.destroy()
  const same = image.stream({ start: layout.dataStart, chunkSize: CLUSTER, readAhead: 1 })
  same.read()
  expect(guest.reads.at(-1)?.into.buffer).toBe(chunk.buffer)
  same.destroy()
})

test('memory that an abandoned read may still write to is not lent before that read has ended', async () => {
  const { image, guest, stream, layout } = dataStream({ readAhead: 2 })
  stream.read()
  guest.at(1).complete() // waits behind the first one, which hangs
  await turn()
  stream.destroy()
  await once(stream, 'close')
  const hanging = guest.at(0).into.buffer
  const waiting = guest.at(1).into.buffer

  const options = { start: layout.dataStart, chunkSize: CLUSTER, readAhead: 3 }
  const second = image.stream(options)
  second.read()
  const lent = guest.reads.slice(2).map(read => read.into.buffer)
  expect([lent.includes(hanging), lent.includes(waiting)]).toEqual([false, true])
  second.destroy()

  guest.at(0).fail(new Error('cancelled at last'))
  await turn()
  const third = image.stream({ ...options, readAhead: 1 })
  third.read()
  expect(guest.reads.at(-1)?.into.buffer).toBe(hanging)
  third.destroy()
})

test('an abandoned read that ends well gives its memory back too', async () => {
  const { image, guest, stream, layout } = dataStream({ readAhead: 1 })
  stream.read()
  stream.destroy()
  guest.at(0).complete()
  await turn()
  const second = image.stream({ start: layout.dataStart, chunkSize: CLUSTER, readAhead: 1 })
  second.read()
  expect(guest.at(1).into.buffer).toBe(guest.at(0).into.buffer)
  second.destroy()
})
