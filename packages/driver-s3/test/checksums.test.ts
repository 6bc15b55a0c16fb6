import { Readable } from 'node:stream'
import { type ByteRange, bytesBody, type UploadBody } from '@varve/core'
import type { S3Driver } from '@varve/driver-s3'
import { PatternBody, patternBytes } from '@varve/testkit'
import { expect, test } from 'vitest'
import { settingsOf } from '../src/s3-options.ts'
import { begin, MIB } from './faulty-s3.ts'

/** The notice of a check, which must pass. */
async function noticeOf(driver: S3Driver): Promise<string | undefined> {
  const { ok, notice } = await driver.check()
  expect(ok).toBe(true)
  return notice
}

/** A body of these bytes whose chunks have the given sizes, over and over. */
function chunked(bytes: Buffer, sizes: readonly number[]): UploadBody {
  function* chunks({ start, end }: ByteRange): Generator<Buffer> {
    for (let at = start, turn = 0; at < end; turn++) {
      const next = Math.min(end, at + (sizes[turn % sizes.length] ?? 1))
      yield bytes.subarray(at, next)
      at = next
    }
  }
  return {
    size: bytes.length,
    replayable: true,
    open: (range = { start: 0, end: bytes.length }) => Readable.from(chunks(range)),
  }
}

test.each<[string, number, number[]]>([
  ['a byte each', 20_000, [1]],
  ['7 KiB each', 3 * MIB, [7 * 1024]],
  ['just too small', 3 * MIB, [8191]],
  ['small and large ones', 6 * MIB, [1, 8192, 300_000, 3, 8191, 8193, 1_048_577]],
  ['small ones, in parts', 11 * MIB + 5, [5000]],
])('what is sent with checksums is taken whose chunks are of %s', async (_, size, sizes) => {
  const { fake, driver } = await begin({ checksums: 'WHEN_SUPPORTED' })
  const bytes = patternBytes(1, 0, size)
  const progress: number[] = []
  await driver.put('a', chunked(bytes, sizes), { onProgress: sent => progress.push(sent) })
  expect(fake.objects.get('a')?.bytes.equals(bytes)).toBe(true)
  expect(progress.at(-1)).toBe(size)
})

test.each(['WHEN_SUPPORTED', 'WHEN_REQUIRED'] as const)(
  'the memory of small chunks is given back once, and the object is whole: %s',
  async checksums => {
    const { fake, driver } = await begin({ checksums })
    for (const size of [1, 8193, 6 * MIB]) {
      for (const chunkSize of [1000, 100_000]) {
        const body = new PatternBody({ size, seed: size, chunkSize })
        await driver.put('a', body)
        expect(body.faults).toEqual([])
        expect(fake.objects.get('a')?.bytes.equals(patternBytes(size, 0, size))).toBe(true)
      }
    }
  },
)

test('chunks that are large enough are sent as they are', async () => {
  const { fake, driver } = await begin({ checksums: 'WHEN_SUPPORTED' })
  await driver.put('a', chunked(patternBytes(2, 0, 40_000), [8192, 10_000, 9000, 12_000, 808]))
  const heads = [...(fake.bodies[0]?.toString('latin1').matchAll(/(?:^|\r\n)([0-9a-f]{1,5})\r\n/g) ?? [])]
  expect(heads.map(([, size = '']) => Number.parseInt(size, 16))).toEqual([
    8192, 10_000, 9000, 12_000, 808, 0,
  ])
})

test.each<[string, string | undefined, string]>([
  ['AWS by its region', undefined, 'WHEN_SUPPORTED'],
  ['AWS by its address', 'https://s3.us-east-1.amazonaws.com', 'WHEN_SUPPORTED'],
  ['a private endpoint of AWS', 'https://vpce-1a-b2.s3.us-east-1.vpce.amazonaws.com:443', 'WHEN_SUPPORTED'],
  ['AWS in capitals', 'https://S3.EU-West-1.AmazonAWS.com', 'WHEN_SUPPORTED'],
  ['AWS in China', 'https://s3.cn-north-1.amazonaws.com.cn', 'WHEN_SUPPORTED'],
  ['AWS over IPv6', 'https://s3.us-east-1.api.aws', 'WHEN_SUPPORTED'],
  ['another server', 'https://s3.example:9000', 'WHEN_REQUIRED'],
  ['a server of a similar name', 'https://notamazonaws.com', 'WHEN_REQUIRED'],
  ["a server with AWS's name before its own", 'https://s3.amazonaws.com.example', 'WHEN_REQUIRED'],
])('whether uploads carry a checksum is decided by the server: %s', (_, endpoint, checksums) => {
  const options = { bucket: 'b', region: 'us-east-1', ...(endpoint !== undefined && { endpoint }) }
  expect(settingsOf(options).checksums).toBe(checksums)
  for (const chosen of ['WHEN_SUPPORTED', 'WHEN_REQUIRED'] as const) {
    expect(settingsOf({ ...options, checksums: chosen }).checksums).toBe(chosen)
  }
})

test.each([
  [
    'InvalidRequest',
    'Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object Lock',
  ],
  ['MissingContentMD5', 'Missing required header for this request: Content-Md5.'],
])('a bucket that wants a checksum with each upload is told with what to set: %s', async (code, message) => {
  const { fake, driver } = await begin()
  fake.faults.set('put', [{ when: 'before', answer: { status: 400, code, message } }])
  await expect(driver.put('a', bytesBody(Buffer.from('x')))).rejects.toMatchObject({
    code: 'STORAGE_FAILED',
    message: expect.stringMatching(/without a checksum.*Set checksums to WHEN_SUPPORTED\./),
  })
  expect(fake.calls).toEqual(['put'])
})

test('another request that is not valid is not taken for one without a checksum', async () => {
  const { fake, driver } = await begin()
  fake.faults.set('put', [{ when: 'before', answer: { status: 400, code: 'InvalidRequest' } }])
  const failure = driver.put('a', bytesBody(Buffer.from('x')))
  await expect(failure).rejects.toMatchObject({ message: expect.not.stringContaining('WHEN_SUPPORTED') })
})

test('a check tells of a server that takes checksums and is not sent any, and leaves nothing', async () => {
  const { fake, driver } = await begin()
  const health = await driver.check()
  expect(health).toMatchObject({
    ok: true,
    notice: expect.stringContaining('Set checksums to WHEN_SUPPORTED.'),
  })
  expect(health.checks).toHaveLength(5)
  expect(fake.objects.size).toBe(0)
})

test('a check tells nothing of checksums where somebody has chosen, or the server does not take them', async () => {
  for (const checksums of ['WHEN_SUPPORTED', 'WHEN_REQUIRED'] as const) {
    const { fake, driver } = await begin({ checksums })
    expect(await noticeOf(driver)).toBeUndefined()
    expect(fake.calls.filter(call => call === 'put')).toHaveLength(1)
  }
  const { fake, driver } = await begin()
  fake.knowsTrailers = false // what is read back then is more than what was written
  expect(await noticeOf(driver)).toBeUndefined()
  expect(fake.calls.filter(call => call === 'put')).toHaveLength(2)
  expect(fake.objects.size).toBe(0)
})
