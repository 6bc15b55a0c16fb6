import { expect, test } from 'vitest'
import { BlockDigester } from '../src/digest.ts'
import { verifyUploads } from '../src/verify-upload.ts'
import { MemoryStorage } from './memory-storage.ts'

const BYTES = Buffer.from(Array.from({ length: 1000 }, (_, i) => i % 251))
const { signal } = new AbortController()

function verify(storage: MemoryStorage): Promise<void> {
  const digester = new BlockDigester(256)
  digester.update(BYTES)
  const { size, digest } = digester.finish()
  return verifyUploads(storage, [{ key: 'object', size, digest }], signal)
}

test('an upload whose reading back breaks off is read on from there, and told from one that is not the same', async () => {
  let left = 1
  const fault = (_: string, at: number) => (at >= 400 && left-- > 0 ? 'end' : undefined)
  const storage = new MemoryStorage({ chunkSize: 100, fault })
  storage.objects.set('object', BYTES)
  await verify(storage)
  expect(storage.downloads.map(({ range }) => range)).toEqual([
    { start: 0, end: 1000 },
    { start: 400, end: 1000 },
  ])
  const other = Buffer.from(BYTES)
  other.writeUInt8(7, 999)
  storage.objects.set('object', other)
  await expect(verify(storage)).rejects.toMatchObject({ code: 'DIGEST_MISMATCH' })
})
