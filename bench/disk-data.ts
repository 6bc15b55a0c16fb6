import { createCipheriv } from 'node:crypto'
import { open, readFile, rm, writeFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { NbdClient } from '@varve/nbd'
import { execa } from 'execa'

const MiB = 1024 * 1024

/** Bytes that do not compress and are the same in each run of the benchmark. */
class RandomBytes {
  readonly #cipher = createCipheriv('aes-128-ctr', Buffer.alloc(16, 7), Buffer.alloc(16, 9))
  readonly #zeros = Buffer.alloc(4 * MiB)

  next(length: number): Buffer {
    return this.#cipher.update(this.#zeros.subarray(0, length))
  }
}

/** Makes a qcow2 disk of `size` bytes whose first, middle and last third each begin with a third of the data. */
export async function createDisk(path: string, size: number, dataBytes: number): Promise<void> {
  const random = new RandomBytes()
  const raw = `${path}.raw`
  const file = await open(raw, 'wx')
  await file.truncate(size)
  for (let region = 0; region < 3; region++) {
    const start = Math.floor(((size / 3) * region) / MiB) * MiB
    for (let done = 0; done < dataBytes / 3; done += 4 * MiB)
      await file.write(random.next(4 * MiB), 0, 4 * MiB, start + done)
  }
  await file.close()
  await execa('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', raw, path])
  await rm(raw)
}

/** Makes a raw image of random data all over. */
export async function createRaw(path: string, size: number): Promise<void> {
  const random = new RandomBytes()
  const file = await open(path, 'wx')
  for (let done = 0; done < size; done += 4 * MiB)
    await file.write(random.next(Math.min(4 * MiB, size - done)))
  await file.close()
}

/** Serves an image while `use` runs. */
export async function withExport<T>(
  path: string,
  options: { format: 'qcow2' | 'raw'; writable?: boolean },
  use: (socketPath: string) => Promise<T>,
): Promise<T> {
  const socketPath = `${path}.sock`
  const pidFile = `${path}.pid`
  await writeFile(pidFile, '')
  const mode = options.writable ? [] : ['--read-only']
  const server = execa(
    'qemu-nbd',
    [
      '--persistent',
      '--shared',
      '8',
      ...mode,
      '-f',
      options.format,
      '-k',
      socketPath,
      '--pid-file',
      pidFile,
      path,
    ],
    {
      reject: false,
    },
  )
  try {
    // The socket file is there before it listens; the process id is written after.
    for (let tries = 0; (await readFile(pidFile, 'utf8')) === ''; tries++) {
      if (tries === 1000) throw new Error(`qemu-nbd does not serve ${path}`)
      await sleep(10)
    }
    return await use(socketPath)
  } finally {
    server.kill()
    await server
    await rm(socketPath, { force: true })
    await rm(pidFile, { force: true })
  }
}

/** Rewrites one 64 KiB cluster in each hundred, from `first` on, so that the image's bitmaps record it. */
export async function rewriteOnePercent(path: string, size: number, first: number): Promise<void> {
  const cluster = 64 * 1024
  const random = new RandomBytes()
  await withExport(path, { format: 'qcow2', writable: true }, async socketPath => {
    await using client = await NbdClient.connect({ socketPath })
    for (let at = first * cluster; at < size; at += 100 * cluster)
      await client.write(at, random.next(cluster))
    await client.flush()
  })
}
