import { randomBytes } from 'node:crypto'
import { readFile, stat, truncate, writeFile } from 'node:fs/promises'
import { describe, expect, it } from 'vitest'
import { type ExtentMap, NbdClient } from '../src/index.ts'
import { Lab, randomNumbers, run } from './real-server.ts'

const MIB = 2 ** 20
const ALLOCATION = 'base:allocation'

/** The flags of every 64 KiB of a map. */
function clusters(map: ExtentMap | undefined, flag: number): boolean[] {
  const found: boolean[] = []
  for (let index = 0; map && index < map.count; index++) {
    const end = map.start(index) + map.length(index)
    while (found.length * 65536 < end) found.push((map.flags(index) & flag) !== 0)
  }
  return found
}

describe('qemu-nbd', () => {
  it('gives the bytes of an image that qemu-img converts, from any ranges at the same time', async () => {
    await using lab = await Lab.create()
    const image = lab.path('image.qcow2')
    await run('qemu-img', 'create', '-q', '-f', 'qcow2', image, '24M')
    await run(
      'qemu-io',
      '-c',
      'write -P 17 1M 3M',
      '-c',
      'write -z 10M 1M',
      '-c',
      'write -P 99 23M 1M',
      image,
    )
    await writeFile(lab.path('noise'), randomBytes(9 * MIB))
    await run('qemu-io', '-c', `write -s ${lab.path('noise')} 12M 9M`, image)
    await run('qemu-img', 'convert', '-O', 'raw', image, lab.path('image.raw'))
    const expected = await readFile(lab.path('image.raw'))
    const server = await lab.qemuNbd('-r', '--shared=8', '-f', 'qcow2', image)

    for (const options of [{}, { connections: 1, maxRequestBytes: 10_000 }, { maxRequestBytes: 32 * MIB }]) {
      await using client = await NbdClient.connect(server.address, options)
      expect(client).toMatchObject({ size: 24 * MIB, readOnly: true, multiConn: true })
      const whole = Buffer.alloc(client.size, 0xee)
      await client.read(0, whole)
      expect(whole.equals(expected)).toBe(true)
      const random = randomNumbers(7)
      const reads = Array.from({ length: 150 }, async () => {
        const offset = random(client.size)
        const into = Buffer.alloc(random(Math.min(200_000, client.size - offset)), 0xee)
        await client.read(offset, into)
        expect(into.equals(expected.subarray(offset, offset + into.length))).toBe(true)
      })
      await Promise.all(reads)
    }
  })

  it.each(['raw', 'qcow2'])('holds what was written to a %s image, as qemu-img compares it', async format => {
    await using lab = await Lab.create()
    const image = lab.path('image')
    const size = 16 * MIB
    await run('qemu-img', 'create', '-q', '-f', format, image, String(size))
    const server = await lab.qemuNbd('--discard=unmap', '--detect-zeroes=off', '-f', format, image)
    const expected = Buffer.alloc(size)
    const random = randomNumbers(11)
    const noise = randomBytes(5 * MIB)
    {
      await using client = await NbdClient.connect(server.address, { maxRequestBytes: 300 * 512 })
      for (let round = 0; round < 100; round++) {
        const length = 1 + random(round % 10 === 0 ? 4 * MIB : 100_000)
        const offset = random(size - length)
        const fua = random(5) === 0
        if (random(3) > 0) {
          const data = noise.subarray(round, round + length)
          await client.write(offset, data, { fua })
          data.copy(expected, offset)
        } else {
          await client.writeZeroes(offset, length, { fua, allowTrim: random(2) === 0 })
          expected.fill(0, offset, offset + length)
        }
      }
      await Promise.all([
        client.write(0, noise),
        client.write(noise.length, noise),
        client.writeZeroes(10 * MIB, MIB),
      ])
      noise.copy(expected)
      noise.copy(expected, noise.length)
      expected.fill(0, 10 * MIB, 11 * MIB)
      await client.flush()
      const whole = Buffer.alloc(size)
      await client.read(0, whole)
      expect(whole.equals(expected)).toBe(true)
    }
    await server.stop()
    await writeFile(lab.path('expected.raw'), expected)
    await run('qemu-img', 'compare', '-f', format, '-F', 'raw', image, lab.path('expected.raw'))
  })

  it('gives back the space of what is trimmed or zeroed, but not of what is zeroed without holes', async () => {
    await using lab = await Lab.create()
    const image = lab.path('image.raw')
    const space = async () => (await stat(image)).blocks * 512
    const bytes = randomBytes(4 * MIB)
    await writeFile(image, bytes, { flush: true })
    const before = await space()
    const server = await lab.qemuNbd('--discard=unmap', '-f', 'raw', image)
    await using client = await NbdClient.connect(server.address)
    await client.writeZeroes(3 * MIB, MIB, { allowTrim: false })
    await client.flush()
    expect(await space()).toBe(before)
    await client.trim(MIB, MIB)
    await client.flush()
    expect(await space()).toBe(before - MIB)
    await client.writeZeroes(2 * MIB, MIB)
    await client.flush()
    expect(await space()).toBe(before - 2 * MIB)
    expect(
      (await readFile(image)).equals(Buffer.concat([bytes.subarray(0, MIB), Buffer.alloc(3 * MIB)])),
    ).toBe(true)
  })

  it('tells allocation and a dirty bitmap together, as qemu-img maps them and as was written', async () => {
    await using lab = await Lab.create()
    const image = lab.path('image.qcow2')
    await run('qemu-img', 'create', '-q', '-f', 'qcow2', image, '64M')
    await run('qemu-io', '-c', 'write -P 1 0 2M', '-c', 'write -P 2 30M 1M', image)
    await run('qemu-img', 'bitmap', '--add', '-g', '65536', image, 'since')
    await run(
      'qemu-io',
      '-c',
      'write -P 3 1M 128k',
      '-c',
      'write -z 30M 512k',
      '-c',
      'write -P 4 50M 1',
      image,
    )
    const server = await lab.qemuNbd('-r', '--shared=8', '-B', 'since', '-f', 'qcow2', image)
    const dirtyBitmap = 'qemu:dirty-bitmap:since'
    await using client = await NbdClient.connect(server.address, {
      metaContexts: [dirtyBitmap, ALLOCATION, 'qemu:dirty-bitmap:other'],
    })
    expect(new Set(client.metaContexts)).toEqual(new Set([ALLOCATION, dirtyBitmap]))
    const maps = await client.mapExtents()

    const dirty = new Set([16, 17, 480, 481, 482, 483, 484, 485, 486, 487, 800])
    expect(clusters(maps.get(dirtyBitmap), 1)).toEqual(
      Array.from({ length: 1024 }, (_, index) => dirty.has(index)),
    )
    const expected: { start: number; length: number; zero: boolean; data: boolean }[] = JSON.parse(
      await run('qemu-img', 'map', '--output=json', '-U', '-f', 'qcow2', image),
    )
    const zero = Array.from({ length: 1024 }, (_, index) => {
      const extent = expected.find(
        ({ start, length }) => start <= index * 65536 && index * 65536 < start + length,
      )
      return extent?.zero === true
    })
    expect(clusters(maps.get(ALLOCATION), 2)).toEqual(zero)

    const status = await client.blockStatus(MIB, 10 * MIB)
    expect(status.get(dirtyBitmap)).toEqual([
      { length: 131_072, flags: 1 },
      { length: 10 * MIB - 131_072, flags: 0 },
    ])
  })

  it('maps more extents than it tells of in one reply', async () => {
    await using lab = await Lab.create()
    const image = lab.path('image.qcow2')
    const count = 140_000
    const raw = Buffer.alloc(count * 512)
    for (let at = 0; at < raw.length; at += 1024) raw.fill(1, at, at + 512)
    await writeFile(lab.path('image.raw'), raw)
    const options = ['-n', '-t', 'unsafe', '-S', '512', '-f', 'raw', '-O', 'qcow2']
    await run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'cluster_size=512', image, String(count * 512))
    await run('qemu-img', 'convert', ...options, lab.path('image.raw'), image)
    const server = await lab.qemuNbd('-r', '-f', 'qcow2', image)
    await using client = await NbdClient.connect(server.address, { metaContexts: [ALLOCATION] })
    const map = (await client.mapExtents()).get(ALLOCATION)
    expect(map?.count).toBe(count)
    for (let index = 0; map && index < map.count; index++) {
      if (
        map.start(index) !== index * 512 ||
        map.length(index) !== 512 ||
        map.flags(index) !== (index % 2) * 3
      )
        throw new Error(`extent ${index} is wrong`)
    }
  })

  it('gives the end of an image of no whole sector', async () => {
    await using lab = await Lab.create()
    const image = lab.path('image.raw')
    const bytes = randomBytes(MIB)
    await writeFile(image, bytes)
    await truncate(image, 1_000_001)
    const server = await lab.qemuNbd('-r', '-f', 'raw', image)
    await using client = await NbdClient.connect(server.address)
    const end = Buffer.alloc(5001)
    await client.read(client.size - 5001, end)
    const padded = Buffer.concat([bytes.subarray(0, 1_000_001), Buffer.alloc(511)])
    expect(end.equals(padded.subarray(client.size - 5001, client.size))).toBe(true)
  })

  it('refuses an export that it does not have, and a write to one that is read-only', async () => {
    await using lab = await Lab.create()
    await writeFile(lab.path('image.raw'), Buffer.alloc(MIB))
    const server = await lab.qemuNbd('-r', '-x', 'disk', '-f', 'raw', lab.path('image.raw'))
    const unknown = NbdClient.connect(server.address, { exportName: 'disc' })
    await expect(unknown).rejects.toMatchObject({ code: 'NBD_CONNECT', context: { exportName: 'disc' } })
    await using client = await NbdClient.connect(server.address, { exportName: 'disk' })
    await expect(client.write(0, Buffer.alloc(512))).rejects.toMatchObject({ code: 'NBD_ARGUMENT' })
  })

  it('serves a client that wants more connections than it takes', async () => {
    await using lab = await Lab.create()
    const bytes = randomBytes(8 * MIB)
    await writeFile(lab.path('image.raw'), bytes)
    const server = await lab.qemuNbd('-r', '--shared=2', '-f', 'raw', lab.path('image.raw'))
    await using client = await NbdClient.connect(server.address, { connections: 8 })
    const whole = Buffer.alloc(bytes.length)
    await client.read(0, whole)
    expect(whole.equals(bytes)).toBe(true)
  })
})
