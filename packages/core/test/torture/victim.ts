// Run as a process of its own, which is killed in the middle of what it is told to do.
import { LocalDriver } from '@varve/driver-local'
import { BackupPipeline } from '../../src/backup-pipeline.ts'
import { ChainManager } from '../../src/chain-manager.ts'
import { errorMessage, isVarveError } from '../../src/errors.ts'
import { recover } from '../../src/recover.ts'
import { RestorePipeline } from '../../src/restore-pipeline.ts'
import type { StoredObject } from '../../src/storage.ts'
import { hostOf, type Job, type Message } from './job.ts'
import { KillPoints } from './kill-points.ts'

class StreamedStorage extends LocalDriver {
  #streaming = false

  override async put(...args: Parameters<LocalDriver['put']>): Promise<StoredObject> {
    if (args[0].endsWith('.qcow2') && !this.#streaming) {
      this.#streaming = true
      await guestWrites()
    }
    const stored = await super.put(...args)
    points.reach(`stored ${args[0].slice(args[0].lastIndexOf('/') + 1)}`)
    return stored
  }
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

/** Does a job; resolves with the id of the backup that it took. */
async function run(job: Job): Promise<string | undefined> {
  const { task, storagePath, stateDir } = job
  const storage = new StreamedStorage({ path: storagePath })
  const host = hostOf(job)
  switch (task.kind) {
    case 'backup':
      return (await new BackupPipeline({ host, storage, stateDir }).run(task.request)).id
    case 'restore':
      await new RestorePipeline({ host, storage, stateDir }).run(task.request)
      return undefined
    case 'delete':
      await new ChainManager({ storage }).delete(task.backup)
      return undefined
    case 'prune':
      await new ChainManager({ storage }).prune(task.policy)
      return undefined
    case 'recover': {
      const { runs } = await recover({ host, storages: [storage], stateDir })
      for (const { error } of runs) if (error) throw error
      return undefined
    }
  }
}

process.once('disconnect', () => process.exit())
process.once('message', async (job: Job) => {
  points.arm(job.kill)
  try {
    const backup = await run(job)
    say({ say: 'done', points: points.labels, ...(backup !== undefined && { backup }) })
  } catch (error) {
    const code = isVarveError(error) ? error.code : 'none'
    say({ say: 'failed', code, message: errorMessage(error), points: points.labels })
  }
  process.disconnect()
})
