// One measured piece of work in a process of its own; see runTask.
import { mkdir } from 'node:fs/promises'
import { text } from 'node:stream/consumers'
import { CephConnector, type CephOptions } from '@varve/ceph'
import { BackupPipeline, type Host, ImageHost, RestorePipeline, type StorageDriver } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { RcloneDriver, type RcloneDriverOptions } from '@varve/driver-rclone'
import { NbdClient } from '@varve/nbd'
import { get, plainPut, put } from './remote.ts'

/** Where backups go, a folder or what rclone reaches, and what they are taken of. */
interface Places {
  readonly storage: string
  readonly rclone?: RcloneDriverOptions
  readonly stateDir: string
  /** How the cluster of an RBD image is reached. */
  readonly ceph?: CephOptions
}

async function storageOf({ storage, rclone }: Places): Promise<StorageDriver> {
  if (rclone) return new RcloneDriver(rclone)
  await mkdir(storage, { recursive: true })
  return new LocalDriver({ path: storage })
}

function hostOf({ ceph }: Places, disks: Record<string, string>): Host {
  return new ImageHost({ instance: 'bench', disks, ...(ceph && { rbd: new CephConnector(ceph) }) })
}

async function backup(input: Places & { disk: string; type: 'full' | 'incremental' }): Promise<object> {
  await using storage = await storageOf(input)
  const host = hostOf(input, { vda: input.disk })
  const pipeline = new BackupPipeline({ host, storage, stateDir: input.stateDir })
  const manifest = await pipeline.run({ instance: 'bench', type: input.type })
  return {
    id: manifest.id,
    chain: manifest.chain,
    storedSize: manifest.disks[0]?.storedSize,
    kind: manifest.kind,
  }
}

async function restore(input: Places & { backup: string; target: string }): Promise<object> {
  await using storage = await storageOf(input)
  const host = hostOf(input, {})
  const pipeline = new RestorePipeline({ host, storage, stateDir: input.stateDir })
  await pipeline.run({ backup: input.backup, to: { disks: { vda: input.target } } })
  return {}
}

async function nbdRead(input: { socketPath: string }): Promise<object> {
  await using client = await NbdClient.connect({ socketPath: input.socketPath })
  // As many large reads in flight as the composer has, into memory that is used again.
  const chunk = 1024 * 1024
  let next = 0
  const reader = async () => {
    const into = new Uint8Array(chunk)
    for (let at = next; at < client.size; at = next) {
      next += chunk
      await client.read(at, into.subarray(0, Math.min(chunk, client.size - at)))
    }
  }
  await Promise.all(Array.from({ length: 16 }, reader))
  return { bytes: client.size }
}

const tasks: Record<string, (input: never) => Promise<object>> = {
  backup,
  restore,
  'nbd-read': nbdRead,
  put,
  get,
  'plain-put': plainPut,
}
const [, , name = ''] = process.argv
const input: unknown = JSON.parse(await text(process.stdin))
const task = tasks[name]
if (!task) throw new Error(`There is no task ${name}.`)
const idleMiB = process.resourceUsage().maxRSS / 1024
const start = performance.now()
const result = await task(input as never)
const seconds = (performance.now() - start) / 1000
const peakMiB = process.resourceUsage().maxRSS / 1024
console.log(JSON.stringify({ ...result, seconds, peakMiB, idleMiB }))
