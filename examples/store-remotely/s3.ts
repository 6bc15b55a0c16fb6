import { BackupPipeline, LibvirtHost } from '@varve/core'
import { S3Driver } from '@varve/driver-s3'

const [instance = 'web-1', bucket = 'backups', endpoint = 'https://s3.example.com'] = process.argv.slice(2)
const { S3_ACCESS_KEY: accessKey = '', S3_SECRET_KEY: secretKey = '' } = process.env
await using storage = new S3Driver({ endpoint, bucket, accessKey, secretKey, pathPrefix: 'varve' })

// Reaches the bucket, then writes, reads back, lists and deletes a probe.
const { checks } = await storage.check()
for (const { name, ok, message } of checks) console.log(`${ok ? 'ok' : 'FAILED'}  ${name} ${message ?? ''}`)

// The first backup of a VM is full, later ones hold what has changed since.
const backups = new BackupPipeline({ host: new LibvirtHost(), storage, stateDir: '/var/lib/varve' })
const { id } = await backups.run({ instance })
console.log(`${id} is in ${storage.location}`)

// What killed processes left of unfinished uploads a day ago or longer takes space and is in no listing.
const removed = await storage.cleanUp({ olderThan: new Date(Date.now() - 24 * 3_600_000) })
console.log(`${removed} unfinished uploads removed`)
