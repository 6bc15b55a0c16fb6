import { randomBytes } from 'node:crypto'
import { writeFile } from 'node:fs/promises'
import { pauseProcess } from '@varve/testkit/lab'
import { describe, expect, it } from 'vitest'
import { NbdClient } from '../src/index.ts'
import { Lab } from './real-server.ts'

const MIB = 2 ** 20
const disk = randomBytes(24 * MIB)

/** Reads the whole disk in pieces, 16 at a time, and calls `onRead` after each. */
async function readAll(client: NbdClient, onRead: (count: number) => void): Promise<void> {
  const piece = 100_000
  let next = 0
  let count = 0
  const reader = async () => {
    while (next < disk.length) {
      const offset = next
      next += piece
      const into = Buffer.alloc(Math.min(piece, disk.length - offset))
      await client.read(offset, into)
      expect(into.equals(disk.subarray(offset, offset + into.length))).toBe(true)
      onRead(++count)
    }
  }
  await Promise.all(Array.from({ length: 16 }, reader))
}

describe('a server that is lost', () => {
  it.each([
    ['qemu-nbd', 'SIGKILL'],
    ['qemu-nbd', 'SIGTERM'],
    ['nbdkit over TCP', 'SIGKILL'],
  ] as const)('and started again is not noticed by reads: %s, %s', async (program, signal) => {
    await using lab = await Lab.create()
    const image = lab.path('image.raw')
    await writeFile(image, disk)
    const slow = ['-r', '--filter=delay', 'file', image, 'rdelay=5ms']
    const start = () => {
      if (program === 'nbdkit over TCP') return lab.nbdkitOnTcp(...slow)
      return lab.qemuNbd('-r', '--shared=8', '-f', 'raw', image)
    }
    let server = await start()
    await using client = await NbdClient.connect(server.address)
    let restarts = 0
    let restarting = Promise.resolve()
    await readAll(client, count => {
      if (count !== 50 && count !== 150) return
      restarting = server.stop(signal).then(async () => {
        server = await start()
        restarts++
      })
    })
    await restarting
    expect(restarts).toBe(2)
  })

  it('for good ends every call with a clear error', async () => {
    await using lab = await Lab.create()
    await writeFile(lab.path('image.raw'), disk)
    const server = await lab.qemuNbd('-r', '--shared=8', '-f', 'raw', lab.path('image.raw'))
    await using client = await NbdClient.connect(server.address, {
      timeoutMs: 500,
      metaContexts: ['base:allocation'],
    })
    const failure = readAll(client, count => {
      if (count === 50) server.signal('SIGKILL')
    })
    await expect(failure).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })
    await expect(client.mapExtents()).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })
  })

  it('fails the writes that were on their way, and the flush of those before', async () => {
    await using lab = await Lab.create()
    const start = () => lab.nbdkit('--filter=delay', 'memory', 'size=1M', 'delay-zero=600')
    const server = await start()
    await using client = await NbdClient.connect(server.address)
    await client.write(0, Buffer.alloc(512))
    const zeroes = expect(client.writeZeroes(0, 512)).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })
    await client.read(0, Buffer.alloc(512))
    await server.stop('SIGKILL')
    await zeroes
    await start()
    await client.read(0, Buffer.alloc(512))
    await expect(client.flush()).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })
  })

  it('for a while, being stopped, runs into the timeout, and serves the next call', async () => {
    await using lab = await Lab.create()
    const server = await lab.nbdkit('memory', 'size=1M')
    await using client = await NbdClient.connect(server.address, { timeoutMs: 300 })
    await pauseProcess(server.process.pid as number)
    await expect(client.read(0, Buffer.alloc(512))).rejects.toMatchObject({ code: 'NBD_TIMEOUT' })
    server.signal('SIGCONT')
    await client.read(0, Buffer.alloc(512))
  })
})
