import { getEventListeners } from 'node:events'
import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { crc32 } from 'node:zlib'
import type { S3DriverOptions } from '@varve/driver-s3'
import { PatternBody, patternBytes } from '@varve/testkit'
import { expect, test, vi } from 'vitest'
import type { Call, Fault } from './fake-s3.ts'
import { begin, count, MIB, SIZE, slowDown } from './faulty-s3.ts'

test('a small object that meets SlowDown is read anew and sent again', async () => {
  const { fake, driver } = await begin({}, { put: [slowDown, slowDown] })
  const body = new PatternBody({ size: 100_000, seed: 1 })
  const progress: number[] = []
  await driver.put('a', body, { onProgress: bytes => progress.push(bytes) })
  expect(count(fake, 'put')).toBe(3)
  expect(fake.objects.get('a')?.bytes.equals(patternBytes(1, 0, 100_000))).toBe(true)
  expect(progress.at(-1)).toBe(100_000)
  expect(body.faults).toEqual([])
})

test('a part that fails is read again, alone', async () => {
  const cut: Fault = { when: 'before', answer: 'cut' }
  const { fake, driver } = await begin({ parallelParts: 1 }, { part: [slowDown, cut] })
  const body = new PatternBody({ size: SIZE, seed: 2 })
  await driver.put('a', body)
  expect(fake.bodies.slice(0, -1).map(bytes => bytes.length)).toEqual([5 * MIB, 5 * MIB, 5 * MIB, MIB + 1])
  expect(fake.objects.get('a')?.bytes.equals(patternBytes(2, 0, SIZE))).toBe(true)
})

test('the memory of chunks is used again while a part is sent', async () => {
  const { driver } = await begin()
  const body = new PatternBody({ size: 20 * MIB, chunkSize: 64 * 1024 })
  await driver.put('a', body)
  expect(body.faults).toEqual([])
  expect(body.allocations).toBeLessThan(64) // of 320 chunks
})

test('a stream of unknown size has parts of one size where they must be, and of growing sizes else', async () => {
  const sizes = async (options: Partial<S3DriverOptions>) => {
    const { fake, driver } = await begin({ parallelParts: 1, ...options })
    await driver.put('a', Readable.from(new Array(34).fill(Buffer.alloc(MIB))))
    return fake.bodies.slice(0, -1).map(bytes => bytes.length / MIB) // without the completion
  }
  expect(await sizes({ equalParts: true })).toEqual([32, 2])
  expect(await sizes({ maxParts: 20 })).toEqual([8, 16, 10])
})

test.each([10, 300_000, SIZE])('an upload of %d bytes leaves nothing on its signal', async size => {
  const { driver } = await begin()
  const { signal } = new AbortController()
  await driver.put('a', new PatternBody({ size }), { signal })
  await driver.put('a', new PatternBody({ size, replayable: false }), { signal })
  await buffer(await driver.get('a', { signal }))
  expect(getEventListeners(signal, 'abort')).toEqual([])
})

test.each([
  ['of one chunk', 10, MIB],
  ['of several chunks', MIB, MIB / 4],
  ['of several parts', SIZE, MIB / 4],
  ['whose last part is small', 5 * MIB + 1000, MIB / 4],
])(
  'an upload %s whose onProgress throws fails, is not tried again, and leaves nothing',
  async (_, size, chunkSize) => {
    const { fake, driver } = await begin({ parallelParts: 1 })
    for (const replayable of [true, false]) {
      for (const from of [0, size]) {
        const error = Object.assign(new Error('nobody looks'), { code: 'EPIPE' }) // which may pass, from the network
        let thrown = 0
        const onProgress = (bytes: number) => {
          if (bytes < from) return
          thrown++
          throw error
        }
        const body = new PatternBody({ size, replayable, chunkSize })
        const open = vi.spyOn(body, 'open')
        const upload = driver.put('a', body, { onProgress })
        await expect(upload).rejects.toBe(error)
        expect(thrown).toBeGreaterThan(0)
        expect(fake.objects.size).toBe(0)
        expect(fake.uploads.size).toBe(0)
        expect(open.mock.calls.length, 'once, or once a part').toBeLessThanOrEqual(2)
      }
    }
  },
)

test('with WHEN_SUPPORTED an upload ends with its CRC32, and memory is used again too', async () => {
  const { fake, driver } = await begin({ checksums: 'WHEN_SUPPORTED' })
  const body = new PatternBody({ size: 4 * MIB, seed: 11, chunkSize: 64 * 1024 })
  await driver.put('a', body)
  expect(body.faults).toEqual([])
  expect(body.allocations).toBeLessThan(64)
  const checksum = Buffer.alloc(4)
  checksum.writeUInt32BE(crc32(patternBytes(11, 0, body.size)))
  const sent = fake.bodies[0]?.subarray(-100).toString('latin1')
  expect(sent).toContain(`\r\n0\r\nx-amz-checksum-crc32:${checksum.toString('base64')}\r\n\r\n`)
  expect(fake.requests[0]?.headers).toMatchObject({ 'x-amz-decoded-content-length': String(body.size) })
})

test('with WHEN_SUPPORTED an upload in parts is completed with the CRC32 of each of them', async () => {
  const { fake, driver } = await begin({ checksums: 'WHEN_SUPPORTED' })
  await driver.put('a', new PatternBody({ size: SIZE, seed: 20 }))
  const request = (call: Call) => fake.requests[fake.calls.indexOf(call)]
  expect(request('create')?.headers).toMatchObject({ 'x-amz-checksum-algorithm': 'CRC32' })
  expect(request('part')?.headers).toMatchObject({ 'x-amz-trailer': 'x-amz-checksum-crc32' })
  const checksums = [patternBytes(20, 0, 5 * MIB), patternBytes(20, 5 * MIB, MIB + 1)].map(part => {
    const checksum = Buffer.alloc(4)
    checksum.writeUInt32BE(crc32(part))
    return checksum.toString('base64')
  })
  const completion = fake.bodies.at(-1)?.toString() ?? ''
  const completed = [...completion.matchAll(/<Part>.*?<\/Part>/g)].map(([part]) => [
    /<PartNumber>(\d+)</.exec(part)?.[1],
    /<ChecksumCRC32>([^<]+)</.exec(part)?.[1],
  ])
  expect(completed).toEqual([
    ['1', checksums[0]],
    ['2', checksums[1]],
  ])
})

test('settings of new objects go with each way of making one', async () => {
  const { fake, driver } = await begin({
    storageClass: 'STANDARD_IA',
    serverSideEncryption: 'aws:kms',
    kmsKeyId: 'key-1',
    sessionToken: 'session',
  })
  await driver.put('small', new PatternBody({ size: 10 }))
  await driver.put('large', new PatternBody({ size: SIZE }))
  for (const call of ['put', 'create'] as const) {
    expect(fake.requests[fake.calls.indexOf(call)]?.headers, call).toMatchObject({
      'x-amz-storage-class': 'STANDARD_IA',
      'x-amz-server-side-encryption': 'aws:kms',
      'x-amz-server-side-encryption-aws-kms-key-id': 'key-1',
      'x-amz-security-token': 'session',
    })
  }
})
