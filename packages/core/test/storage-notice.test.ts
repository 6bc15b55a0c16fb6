import { expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import type { VarveEvent } from '../src/events.ts'
import { ImageHost } from '../src/image-host.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'
import type { StorageDriver } from '../src/storage.ts'
import { MemoryStorage } from './memory-storage.ts'

const host = new ImageHost({ instance: 'web-1', disks: {} })
const stateDir = '/nonexistent'

test.each(['a word of caution', undefined])(
  'what a storage has to say is told once by each backup and restore: %s',
  async notice => {
    const plain = new MemoryStorage()
    const storage: StorageDriver = notice === undefined ? plain : Object.assign(plain, { notice })
    const warnings = async (run: (onEvent: (event: VarveEvent) => void) => Promise<unknown>) => {
      const events: VarveEvent[] = []
      await expect(run(event => events.push(event))).rejects.toMatchObject({ name: 'VarveError' })
      return events.flatMap(event => (event.type === 'warning' ? [event.message] : []))
    }
    const told = notice === undefined ? [] : [notice]
    const backups = new BackupPipeline({ host, storage, stateDir })
    expect(await warnings(onEvent => backups.run({ instance: 'web-2' }, { onEvent }))).toEqual(told)
    const restores = new RestorePipeline({ host, storage, stateDir })
    const request = { backup: 'none', to: { instance: 'web-1' } }
    expect(await warnings(onEvent => restores.run(request, { onEvent }))).toEqual(told)
  },
)
