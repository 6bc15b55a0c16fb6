import { randomBytes } from 'node:crypto'
import { rm, writeFile } from 'node:fs/promises'
import { describe, expect, it } from 'vitest'
import { NbdClient, NbdError } from '../src/index.ts'
import { Lab, randomNumbers, run } from './real-server.ts'

const MIB = 2 ** 20
const TIB = 2 ** 40

/** What nbdkit's pattern plugin holds: the offset of every eight bytes. */
function pattern(offset: number, length: number): Buffer {
  const start = offset - (offset % 8)
  const bytes = Buffer.alloc(Math.ceil((offset + length - start) / 8) * 8)
  for (let at = 0; at < bytes.length; at += 8) bytes.writeBigUInt64BE(BigInt(start + at), at)
  return bytes.subarray(offset - start, offset - start + length)
}

describe('nbdkit', () => {
  it.each([
    ['with structured replies', []],
    ['with simple replies', ['--no-sr']],
  ])('gives every byte of a disk of 16 TiB %s', async (_what, flags) => {
    await using lab = await Lab.create()
    const server = await lab.nbdkit(...flags, 'pattern', 'size=16T')
    await using client = await NbdClient.connect(server.address)
    expect(client.size).toBe(16 * TIB)
    const reads = [0, 1, 2 ** 32 - 5, 2 ** 33 + 3, 5 * TIB - 1, 16 * TIB - 3_000_000].map(async offset => {
      const into = Buffer.alloc(3_000_000)
      await client.read(offset, into)
      expect(into.equals(pattern(offset, into.length))).toBe(true)
    })
    await Promise.all(reads)
  })

  it('takes writes without structured replies', async () => {
    await using lab = await Lab.create()
    const server = await lab.nbdkit('--no-sr', 'memory', 'size=8M')
    await using client = await NbdClient.connect(server.address, { metaContexts: ['base:allocation'] })
    expect(client.metaContexts).toEqual([])
    const data = randomBytes(3 * MIB + 1)
    await client.write(MIB + 3, data)
    await client.writeZeroes(2 * MIB, 1000)
    await client.trim(3 * MIB, 1000)
    await client.flush()
    const into = Buffer.alloc(data.length)
    await client.read(MIB + 3, into)
    data.fill(0, MIB - 3, MIB + 997)
    data.fill(0, 2 * MIB - 3, 2 * MIB + 997)
    expect(into.equals(data)).toBe(true)
  })

  it('is reached over TCP, by address and by name', async () => {
    await using lab = await Lab.create()
    const server = await lab.nbdkitOnTcp('pattern', 'size=1G')
    if (!('port' in server.address)) throw new Error('no port')
    for (const host of ['127.0.0.1', 'localhost']) {
      await using client = await NbdClient.connect({ host, port: server.address.port })
      const into = Buffer.alloc(20 * MIB)
      await client.read(12_345, into)
      expect(into.equals(pattern(12_345, into.length))).toBe(true)
    }
  })

  it('maps a sparse disk as nbdinfo does', async () => {
    await using lab = await Lab.create()
    const server = await lab.nbdkit('sparse-random', 'size=4G', 'seed=3')
    await using client = await NbdClient.connect(server.address, { metaContexts: ['base:allocation'] })
    const map = (await client.mapExtents()).get('base:allocation')
    if (!('socketPath' in server.address) || !map) throw new Error('no map')
    const uri = `nbd+unix:///?socket=${server.address.socketPath}`
    const expected: { offset: number; length: number; type: number }[] = JSON.parse(
      await run('nbdinfo', '--map', '--json', uri),
    )
    const found = Array.from({ length: map.count }, (_, index) => ({
      offset: map.start(index),
      length: map.length(index),
      type: map.flags(index),
    }))
    expect(found.length).toBeGreaterThan(10)
    expect(found).toEqual(expected.map(({ offset, length, type }) => ({ offset, length, type })))
  })

  it('gets only requests that fit its block size, and gives ranges that do not', async () => {
    await using lab = await Lab.create()
    const server = await lab.nbdkit(
      '--filter=blocksize-policy',
      'pattern',
      'size=100M',
      'blocksize-minimum=4096',
      'blocksize-preferred=65536',
      'blocksize-maximum=1M',
      'blocksize-error-policy=error',
    )
    await using client = await NbdClient.connect(server.address, { maxRequestBytes: 32 * MIB })
    expect(client.blockSize).toEqual({ minimum: 4096, preferred: 65536, maximum: MIB })
    const random = randomNumbers(5)
    const reads = Array.from({ length: 200 }, async (_, index) => {
      const length = random(index % 20 === 0 ? 5 * MIB : 20_000)
      const offset = random(client.size - length)
      const into = Buffer.alloc(length)
      await client.read(offset, into)
      expect(into.equals(pattern(offset, length))).toBe(true)
    })
    await Promise.all(reads)
  })

  it('gives its errors to the calls that they are for, and nothing but right bytes to the others', async () => {
    await using lab = await Lab.create()
    const trigger = lab.path('trigger')
    const server = await lab.nbdkit(
      '--filter=error',
      'pattern',
      'size=100M',
      'error-pread=EIO',
      'error-pread-rate=30%',
      `error-pread-file=${trigger}`,
    )
    await using client = await NbdClient.connect(server.address)
    await writeFile(trigger, '')
    const outcomes = { right: 0, failed: 0 }
    const reads = Array.from({ length: 200 }, async (_, index) => {
      const into = Buffer.alloc(4096)
      try {
        await client.read(index * 100_000, into)
        expect(into.equals(pattern(index * 100_000, 4096))).toBe(true)
        outcomes.right++
      } catch (error) {
        if (!(error instanceof NbdError)) throw error
        expect(error).toMatchObject({ code: 'NBD_SERVER', errno: 'EIO' })
        outcomes.failed++
      }
    })
    await Promise.all(reads)
    expect(outcomes.right).toBeGreaterThan(0)
    expect(outcomes.failed).toBeGreaterThan(0)
    await rm(trigger)
    await client.read(0, Buffer.alloc(10 * MIB))
  })

  it('fails a write with its error', async () => {
    await using lab = await Lab.create()
    const server = await lab.nbdkit(
      '--filter=error',
      'memory',
      'size=1M',
      'error-pwrite=ENOSPC',
      'error-pwrite-rate=1',
    )
    await using client = await NbdClient.connect(server.address)
    const failure = client.write(0, Buffer.alloc(65536))
    await expect(failure).rejects.toMatchObject({ code: 'NBD_SERVER', errno: 'ENOSPC' })
  })

  it('that is slow runs into the timeout, or into the signal', async () => {
    await using lab = await Lab.create()
    const server = await lab.nbdkit('--filter=delay', 'memory', 'size=1M', 'rdelay=600')
    await using impatient = await NbdClient.connect(server.address, { timeoutMs: 200 })
    await expect(impatient.read(0, Buffer.alloc(512))).rejects.toMatchObject({ code: 'NBD_TIMEOUT' })
    await using patient = await NbdClient.connect(server.address)
    const controller = new AbortController()
    const read = patient.read(0, Buffer.alloc(512), { signal: controller.signal })
    controller.abort()
    await expect(read).rejects.toMatchObject({ code: 'NBD_ABORTED' })
    await patient.write(0, Buffer.alloc(512))
  })

  it('is given up when the disk is larger than a number can count', async () => {
    await using lab = await Lab.create()
    const server = await lab.nbdkit('null', 'size=9223372036854775807')
    await expect(NbdClient.connect(server.address)).rejects.toMatchObject({ code: 'NBD_CONNECT' })
  })
})
