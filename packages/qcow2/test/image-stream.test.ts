import { getEventListeners, once } from 'node:events'
import { Writable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { setImmediate as turn } from 'node:timers/promises'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { ComposedImage, ExtentKind, ExtentList, planImage } from '../src/index.ts'
import { compose, layerPlans, memoryGuest, nextDisk } from './chain-model.ts'
import { ControlledGuest } from './controlled-guest.ts'
import { CLUSTER, CLUSTERS, DISK, dataStream, take } from './data-stream.ts'

test('a stream is the bytes of its range, whatever its chunks and however late reads end', async () => {
  await fc.assert(
    fc.asyncProperty(
      layerPlans(13, 2 ** 19),
      fc.nat(),
      fc.nat(),
      fc.integer({ min: 1, max: 100_000 }),
      fc.integer({ min: 1, max: 20 }),
      fc.infiniteStream(fc.integer({ min: 0, max: 3 })),
      async (plan, a, b, chunkSize, readAhead, delays) => {
        const disk = nextDisk(undefined, plan)
        const { layout, file } = await compose(plan, disk)
        const start = a % (file.length + 1)
        const end = start + (b % (file.length - start + 1))
        const guest = memoryGuest(disk.subarray(0, plan.size))
        const image = new ComposedImage(layout, {
          async read(offset, into) {
            for (let turns: number = delays.next().value; turns > 0; turns--) await turn()
            await guest.read(offset, into)
          },
        })
        const size = Math.max(chunkSize, Math.ceil((end - start) / 200)) // not too many chunks
        const parts: Buffer[] = []
        for await (const chunk of image.stream({ start, end, chunkSize: size, readAhead })) {
          parts.push(Buffer.from(chunk))
          image.recycle(chunk)
        }
        expect(Buffer.concat(parts).equals(file.subarray(start, end))).toBe(true)
        expect(parts.slice(0, -1).every(part => part.length === size)).toBe(true)
      },
    ),
  )
})

test('without options a stream is the whole file in chunks of 1 MiB, sixteen at a time', async () => {
  const list = new ExtentList()
  list.append(40 * 2 ** 20, ExtentKind.data)
  const layout = planImage(list)
  const guest = new ControlledGuest(Buffer.alloc(list.size))
  const stream = new ComposedImage(layout, guest).stream()
  stream.read()
  await turn()
  expect(guest.reads.length).toBe(16)
  expect(guest.at(15).into.length).toBe(2 ** 20)
  const sizes: number[] = []
  for (let i = 0; i < guest.reads.length; i++) {
    guest.at(i).complete()
    sizes.push((await take(stream)).length)
    await turn()
  }
  expect(sizes).toEqual([...Array.from({ length: 40 }, () => 2 ** 20), layout.fileSize - 40 * 2 ** 20])
  expect(stream.read()).toBe(null)
  await turn()
  expect([stream.readableEnded, stream.closed]).toEqual([true, true])
})

test('chunks come in order though their reads end in another', async () => {
  const { guest, stream } = dataStream()
  stream.read()
  for (const index of [3, 1, 2]) guest.at(index).complete()
  await turn()
  expect(stream.readableLength).toBe(0)
  guest.at(0).complete()
  for (let i = 0; i < 4; i++)
    expect((await take(stream)).equals(DISK.subarray(i * CLUSTER, (i + 1) * CLUSTER))).toBe(true)
  stream.destroy()
})

test('a chunk is the very memory that the guest filled', async () => {
  const { guest, stream } = dataStream()
  stream.read()
  guest.at(0).complete()
  const chunk = await take(stream)
  expect(chunk.buffer).toBe(guest.at(0).into.buffer)
  expect(chunk.buffer.byteLength).toBe(CLUSTER) // its own, not a part of a pool that others see
  stream.destroy()
})

test('nothing is read before the consumer asks, and no more than fits when it does not take', async () => {
  const { guest, stream } = dataStream({ readAhead: 4 })
  await turn()
  expect(guest.reads.length).toBe(0)
  stream.read()
  expect(guest.reads.length).toBe(4)
  for (let i = 0; i < guest.reads.length; i++) {
    guest.at(i).complete()
    await turn()
  }
  expect(guest.reads.length).toBe(5) // one waits in the stream, four behind it
  for (let i = 0; i < 3; i++) stream.read()
  for (let i = 5; i < guest.reads.length; i++) {
    guest.at(i).complete()
    await turn()
  }
  expect(guest.reads.length).toBe(8)
  stream.destroy()
})

test('with readAhead 1 there is one read at a time', async () => {
  const { guest, stream } = dataStream({ readAhead: 1 })
  for (let i = 0; i < CLUSTERS; i++) {
    stream.read()
    expect(guest.reads.length).toBe(i + 1)
    guest.at(i).complete()
    await turn()
  }
  expect(guest.reads.length).toBe(CLUSTERS)
  stream.destroy()
})

test.each([0, -1, 1.5, Number.NaN])('%d is neither a chunk size nor a read-ahead', value => {
  const { image, stream } = dataStream()
  for (const option of ['chunkSize', 'readAhead'])
    expect(() => image.stream({ [option]: value })).toThrow(
      expect.objectContaining({
        code: 'QCOW2_ARGUMENT',
        message: `${option} is a whole number from 1, not ${value}.`,
        context: { [option]: value },
      }),
    )
  stream.destroy()
})

test('an empty range is an empty stream', async () => {
  const { image, guest, layout, stream } = dataStream()
  stream.destroy()
  for (const at of [0, layout.dataStart, image.size])
    expect(await image.stream({ start: at, end: at }).toArray()).toEqual([])
  expect(guest.reads.length).toBe(0)
})

test('a failed read destroys the stream with its error and cancels the others', async () => {
  const { guest, stream } = dataStream()
  const failure = new Error('the disk is gone')
  const outcome = expect(pipeline(stream, new Writable({ objectMode: true }))).rejects.toBe(failure)
  await turn()
  expect(guest.at(0).signal?.aborted).toBe(false)
  guest.at(2).fail(failure)
  await outcome
  expect(stream.errored).toBe(failure)
  expect(guest.reads.map(read => read.signal?.aborted)).toEqual([true, true, true, true])
  guest.at(0).fail(new Error('cancelled'))
  guest.at(1).complete()
  guest.at(3).fail(new Error('cancelled'))
  await turn() // a rejection that nobody handles would fail this run
  expect(guest.reads.length).toBe(4)
})

test('destroying a stream cancels its reads', async () => {
  const { guest, stream } = dataStream()
  stream.read()
  stream.destroy()
  await once(stream, 'close')
  expect(guest.reads.map(read => read.signal?.aborted)).toEqual([true, true, true, true])
  for (const read of guest.reads) read.fail(new Error('cancelled'))
  await turn()
  expect(stream.errored).toBe(null)
})

test('a signal ends the stream with its reason', async () => {
  const abort = new AbortController()
  const { guest, stream } = dataStream({ signal: abort.signal })
  stream.read()
  const reason = new Error('given up')
  abort.abort(reason)
  const [error] = await once(stream, 'error')
  expect(error).toBe(reason)
  expect(guest.at(3).signal?.reason).toBe(reason)
  for (const read of guest.reads) read.fail(reason)
  await turn()
})

test('a signal that has fired already, and one whose reason is no error, end it too', async () => {
  const { guest, stream } = dataStream({ signal: AbortSignal.abort('no time') })
  await expect(stream.toArray()).rejects.toMatchObject({ cause: 'no time' })
  expect(guest.reads.length).toBe(0)
})

test('a stream that is over has left its signal', async () => {
  const abort = new AbortController()
  const { guest, stream } = dataStream({ signal: abort.signal, readAhead: CLUSTERS })
  expect(getEventListeners(abort.signal, 'abort').length).toBe(1)
  const all = stream.toArray()
  await turn()
  for (const read of guest.reads) read.complete()
  expect(Buffer.concat(await all).equals(DISK)).toBe(true)
  expect(getEventListeners(abort.signal, 'abort').length).toBe(0)
  abort.abort()
  expect(stream.errored).toBe(null)
})

test('a guest that rejects with what is no error still fails the stream with one', async () => {
  const { guest, stream } = dataStream()
  stream.read()
  guest.at(0).fail('lost' as unknown as Error)
  const [error] = await once(stream, 'error')
  expect(error).toEqual(new Error('lost'))
  for (const read of guest.reads.slice(1)) read.complete()
})

test('a slow writer gets everything through a pipeline', async () => {
  const { layout } = dataStream()
  const image = new ComposedImage(layout, memoryGuest(DISK))
  const parts: Buffer[] = []
  await pipeline(
    image.stream({ chunkSize: 1000, readAhead: 3 }),
    new Writable({
      highWaterMark: 1,
      write(chunk: Buffer, _encoding, done) {
        parts.push(Buffer.from(chunk))
        image.recycle(chunk)
        setImmediate(done)
      },
    }),
  )
  const whole = Buffer.alloc(layout.fileSize)
  await image.read(0, whole)
  expect(Buffer.concat(parts).equals(whole)).toBe(true)
})
