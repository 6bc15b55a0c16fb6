import { BackupPipeline, LibvirtHost } from '@varve/core'
import { FtpDriver } from '@varve/driver-ftp'

const [instance = 'web-1', host = 'nas.example.org', username = 'varve'] = process.argv.slice(2)
const { FTP_PASSWORD: password = '' } = process.env

await using storage = new FtpDriver({
  host,
  username,
  password,
  pathPrefix: 'backups',
  create: true,
  // Explicit TLS is the default. A server that signs its certificate itself: ca: await readFile('nas.pem', 'utf8')
})

// Connects, then writes, reads back, lists and deletes a small object; says what is wrong, and what to do.
const { ok, checks } = await storage.check()
if (!ok) throw new Error(checks.at(-1)?.message)

const backups = new BackupPipeline({ host: new LibvirtHost(), storage, stateDir: '/var/lib/varve' })
const { id } = await backups.run({ instance }, { onEvent: event => console.log(event) })
console.log(`${id} is on ${storage.location}`)
