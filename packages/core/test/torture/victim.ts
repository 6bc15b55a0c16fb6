// Run as a process of its own, which is killed in the middle of what it is told to do.
import { CephConnector } from '@varve/ceph'
import { LocalDriver } from '@varve/driver-local'
import type { S3DriverOptions } from '@varve/driver-s3'
import { BackupPipeline } from '../../src/backup-pipeline.ts'
import { ChainManager } from '../../src/chain-manager.ts'
import { errorMessage, isVarveError } from '../../src/errors.ts'
import { recover } from '../../src/recover.ts'
import { RestorePipeline } from '../../src/restore-pipeline.ts'
import type { StorageDriver } from '../../src/storage.ts'
import { hostOf, type Job, type Message, type Result, type StoragePlace } from './job.ts'
import { KillPoints } from './kill-points.ts'

/** The objects that hold what a disk held. */
const IMAGE = /\.(qcow2|rbd-diff)$/

/**
 * A storage where each object is a point when it is stored in part, and one when it is stored, and where the guest writes
 * once the first image is to be stored.
 */
async function openStorage(place: StoragePlace): Promise<StorageDriver> {
  const storage = typeof place === 'string' ? new LocalDriver({ path: place }) : await openBucket(place)
  const put = storage.put.bind(storage)
  let streaming = false
  storage.put = async (key, body, options = {}) => {
    if (IMAGE.test(key) && !streaming) {
      streaming = true
      await guestWrites()
    }
    const name = key.slice(key.lastIndexOf('/') + 1)
    let begun = false
    const onProgress = (bytes: number) => {
      options.onProgress?.(bytes)
      if (!begun) points.reach(`storing ${name}`)
      begun = true
    }
    const stored = await put(key, body, { ...options, onProgress })
    points.reach(`stored ${name}`)
    return stored
  }
  return storage
}

/** Loaded for those only that need it: it is large. */
async function openBucket(options: S3DriverOptions): Promise<StorageDriver> {
  const { S3Driver } = await import('@varve/driver-s3')
  return new S3Driver(options)
}

const points = new KillPoints()

function guestWrites(): Promise<void> {
  return new Promise(resolve => {
    process.once('message', () => resolve())
    say({ say: 'streaming' })
  })
}

function say(message: Message): void {
  process.send?.(message)
}

async function run(job: Job): Promise<Result> {
  const { task, stateDir, ceph } = job
  const storage = await openStorage(job.storage)
  const host = hostOf(job)
  switch (task.kind) {
    case 'backup':
      return { backup: (await new BackupPipeline({ host, storage, stateDir }).run(task.request)).id }
    case 'restore':
      await new RestorePipeline({ host, storage, stateDir }).run(task.request)
      return {}
    case 'delete':
      await new ChainManager({ storage, host, stateDir }).delete(task.backup)
      return { removed: [task.backup] }
    case 'prune': {
      const { removed } = await new ChainManager({ storage, host, stateDir }).prune(task.policy)
      return { removed: removed.map(({ manifest }) => manifest.id) }
    }
    case 'recover': {
      const rbd = ceph && new CephConnector(ceph)
      const { runs } = await recover({ host, storages: [storage], stateDir, ...(rbd && { rbd }) })
      for (const { error } of runs) if (error) throw error
      return {}
    }
  }
}

process.once('disconnect', () => process.exit())
process.once('message', async (job: Job) => {
  points.arm(job.kill)
  try {
    say({ say: 'done', ...(await run(job)), points: points.labels })
  } catch (error) {
    const code = isVarveError(error) ? error.code : 'none'
    say({ say: 'failed', code, message: errorMessage(error), points: points.labels })
  }
  process.disconnect()
})
