import type { Readable } from 'node:stream'
import { PatternBody, patternBytes } from '@varve/testkit'
import { expect, test } from 'vitest'
import { begin, MIB } from './faulty-s3.ts'

/** A stream of this size, and of what it has given. */
function streamOf(size: number): Readable {
  return new PatternBody({ size, seed: 1, chunkSize: MIB, replayable: false }).open()
}

test('a stream that is too large fails with what to set, leaves nothing, and then fits', async () => {
  const limits = { maxParts: 1, equalParts: true }
  const { fake, driver } = await begin(limits)
  const size = 33 * MIB
  const error = await driver.put('a', streamOf(size)).catch(error => error)
  expect(error).toMatchObject({ code: 'UPLOAD_FAILED', context: { limit: 32 * MIB } })
  expect(error.message).toMatch(
    /Set partSize to \d+ for one of up to \d+, or more; it takes so much memory\./,
  )
  expect(fake.uploads.size).toBe(0)
  expect(fake.objects.size).toBe(0)

  const [, partSize, next] = /partSize to (\d+) for one of up to (\d+)/.exec(error.message) ?? []
  expect(Number(next)).toBeGreaterThan(size)
  const { fake: other, driver: following } = await begin({ ...limits, partSize: Number(partSize) })
  await following.put('a', streamOf(size))
  expect(other.objects.get('a')?.bytes.equals(patternBytes(1, 0, size))).toBe(true)
})

test('a body of known size that opens once, and is too large, is refused before a byte of it is read', async () => {
  const { fake, driver } = await begin({ maxParts: 2 })
  const size = 2 * 96 * MIB + 1
  let opened = false
  const body = {
    size,
    replayable: false,
    open: () => {
      opened = true
      return streamOf(size)
    },
  }
  await expect(driver.put('a', body)).rejects.toMatchObject({
    code: 'UPLOAD_FAILED',
    message: expect.stringContaining(`Set partSize to ${192 * MIB} for one of up to ${2 * 192 * MIB}`),
  })
  expect(opened).toBe(false)
  expect(fake.calls).toEqual([])
})
