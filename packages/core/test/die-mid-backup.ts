// Run by a test as a process of its own: takes a backup and is killed in the middle of its upload.
import { LocalDriver } from '@varve/driver-local'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { LibvirtHost } from '../src/libvirt-host.ts'

const { uri, overlayFolder, storagePath, stateDir, instance } = JSON.parse(process.env.VARVE_TEST ?? '')
const pipeline = new BackupPipeline({
  host: new LibvirtHost({ uri, overlayFolder }),
  storage: new LocalDriver({ path: storagePath }),
  stateDir,
})
await pipeline.run(
  { instance, bandwidth: 1024 * 1024 },
  {
    onEvent: event => {
      if (event.type === 'progress' && event.bytesDone > 0) process.kill(process.pid, 'SIGKILL')
    },
  },
)
