import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { BlockDigester, blake3Hex, blockDigest, DIGEST_BLOCK_SIZE, rootDigest } from '../src/digest.ts'

/** The input of BLAKE3's published test vectors: bytes that count from 0 to 250 over and over. */
function vectorInput(length: number): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => i % 251)
}

/** A digester's rule in its plainest form. */
function digestAtOnce(bytes: Uint8Array, blockSize: number): { root: string; blocks: Uint8Array } {
  const digests: Uint8Array[] = []
  for (let start = 0; start < bytes.length; start += blockSize) {
    digests.push(blockDigest(bytes.slice(start, start + blockSize)))
  }
  const blocks = new Uint8Array(Buffer.concat(digests))
  return { root: rootDigest(blocks), blocks }
}

describe('digests', () => {
  it.each([
    [0, 'af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262'],
    [1, '2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213'],
    [1023, '10108970eeda3eb932baac1428c7a2163b0e924c9a9e25b35bba72b28f70bd11'],
    [1024, '42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7'],
    [1025, 'd00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444'],
  ])("are BLAKE3's own: its test vector of %i bytes", (length, digest) => {
    const input = vectorInput(length)
    expect(blake3Hex(input)).toBe(digest)
    expect(Buffer.from(blockDigest(input)).toString('hex')).toBe(digest)
  })

  it('have blocks of 4 MiB, the last one shorter', () => {
    const input = vectorInput(2 * DIGEST_BLOCK_SIZE + 5)
    const digester = new BlockDigester()
    digester.update(input)
    const { size, digest, blocks } = digester.finish()
    expect(size).toBe(8_388_613)
    expect(digest.blockSize).toBe(4_194_304)
    expect(blocks.byteLength).toBe(3 * 32)
    expect(Buffer.from(blocks.subarray(64)).toString('hex')).toBe(
      blake3Hex(input.subarray(2 * DIGEST_BLOCK_SIZE)),
    )
    expect(digest.root).toBe(blake3Hex(blocks))
  })

  it('of an empty object are an empty list', () => {
    const { size, digest, blocks } = new BlockDigester().finish()
    expect(size).toBe(0)
    expect(blocks.byteLength).toBe(0)
    expect(digest.root).toBe('af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262')
  })

  it('do not depend on how the object is cut into chunks', () => {
    fc.assert(
      fc.property(
        fc.array(fc.uint8Array({ maxLength: 300 }), { maxLength: 40 }),
        fc.integer({ min: 1, max: 257 }),
        (chunks, blockSize) => {
          const digester = new BlockDigester(blockSize)
          for (const chunk of chunks) {
            const passing = Uint8Array.from(chunk)
            digester.update(passing)
            passing.fill(0xff) // its owner uses the memory again
          }
          const whole = new Uint8Array(Buffer.concat(chunks))
          const expected = digestAtOnce(whole, blockSize)
          const actual = digester.finish()
          expect(actual.size).toBe(whole.byteLength)
          expect(actual.digest).toEqual({ root: expected.root, blockSize })
          expect(actual.blocks).toEqual(expected.blocks)
        },
      ),
    )
  })

  it('keep the digests of as many blocks as there are', () => {
    const input = vectorInput(1000)
    const digester = new BlockDigester(1)
    digester.update(input)
    expect(digester.finish().blocks).toEqual(digestAtOnce(input, 1).blocks)
  })

  it.each([0, -1, 1.5, Number.NaN])('refuse the block size %d', blockSize => {
    expect(() => new BlockDigester(blockSize)).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }))
  })

  it('refuse more bytes after the end', () => {
    const digester = new BlockDigester()
    digester.finish()
    expect(() => digester.update(new Uint8Array(1))).toThrow(
      expect.objectContaining({ code: 'INVALID_ARGUMENT' }),
    )
  })
})
