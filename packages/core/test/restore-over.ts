// Run by a test as a process of its own, which is allowed less: restores a backup over a file and prints how that went.
import { LocalDriver } from '@varve/driver-local'
import type { VarveError } from '../src/errors.ts'
import { ImageHost } from '../src/image-host.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'

const { disk, storagePath, stateDir, backup, target } = JSON.parse(process.argv[2] ?? '')
const pipeline = new RestorePipeline({
  host: new ImageHost({ instance: 'web-1', disks: { vda: disk } }),
  storage: new LocalDriver({ path: storagePath }),
  stateDir,
})
let bytesDone = 0
const error = await pipeline
  .run(
    { backup, to: { disks: { vda: target }, overwrite: true } },
    {
      onEvent: event => {
        if (event.type === 'progress') bytesDone = event.bytesDone
      },
    },
  )
  .then(
    () => undefined,
    ({ code, message, context }: VarveError) => ({ code, message, context }),
  )
console.log(JSON.stringify({ bytesDone, error }))
