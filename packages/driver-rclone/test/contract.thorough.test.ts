import { randomBytes } from 'node:crypto'
import { mkdir, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { RcloneDriver, type RcloneDriverOptions } from '@varve/driver-rclone'
import { type DriverTarget, describeDriver, NetworkProxy, type RawObject } from '@varve/testkit'
import { mountTmpfs, type RadosgwLab, type S3User, startRadosgw, type Tmpfs } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, beforeAll, describe } from 'vitest'
import { filesIn, fillFolder } from './rclone-target.ts'

const MIB = 1024 * 1024
const CAPACITY = 8 * MIB
const IDLE_TIMEOUT_MS = 5000
const WRONG = 'not-the-secret'

const capabilities = { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false }

/** A driver, the folder of its remote, and the configuration file that the remote is in. */
interface RemoteFolder extends DriverTarget {
  readonly path: string
  readonly configFile: string
}

let folder: string
const secrets: string[] = []
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-rclone-thorough-'))
})
afterAll(() => rm(folder, { recursive: true }))

/** Writes a configuration with the remote `remote`, and gives its path. */
async function configured(remote: Readonly<Record<string, string>>): Promise<string> {
  const configFile = join(folder, `${randomBytes(4).toString('hex')}.conf`)
  const lines = Object.entries(remote).map(([name, value]) => `${name} = ${value}`)
  await writeFile(configFile, `[remote]\n${lines.join('\n')}\n`)
  return configFile
}

/** What rclone prints, run by the test. */
async function rclone(configFile: string, args: readonly string[], input?: string): Promise<Buffer> {
  const { stdout } = await execa('rclone', ['--config', configFile, ...args], {
    ...(input !== undefined && { input }),
    env: { PATH: process.env.PATH ?? '' },
    extendEnv: false, // variables such as AWS_CA_BUNDLE are not meant for it
    encoding: 'buffer',
    timeout: 120_000,
  })
  return Buffer.from(stdout)
}

/** A driver on a folder of a remote, which rclone also looks at without it. */
function targetOn(
  configFile: string,
  path: string,
  options: Partial<RcloneDriverOptions> & { lookBy?: string } = {},
): RemoteFolder {
  const { lookBy = configFile, ...more } = options
  return {
    path,
    configFile,
    driver: new RcloneDriver({ remoteName: 'remote', configFile, pathPrefix: path, ...more }),
    async inspect() {
      const args = ['lsjson', '-R', '--files-only', '--no-modtime', '--no-mimetype', `remote:${path}`]
      const entries: { Path: string; Size: number }[] = JSON.parse(String(await rclone(lookBy, args)))
      return entries.map(({ Path, Size }) => ({ name: Path, size: Size }))
    },
    readRaw: name => rclone(lookBy, ['cat', `remote:${path}/${name}`]),
    dispose: async () => undefined, // what it holds goes with the storage
  }
}

async function leaveUnfinished({ configFile, path }: RemoteFolder): Promise<void> {
  await rclone(configFile, ['rcat', `remote:${path}/killed/.varve-part-0123456789abcdef`], 'half')
}

/** By one rclone, from a folder. */
async function fill({ configFile, path }: RemoteFolder, keys: readonly string[]): Promise<void> {
  const from = await mkdtemp(join(folder, 'from-'))
  await fillFolder(from, keys)
  await rclone(configFile, ['copy', '--transfers', '16', from, `remote:${path}`])
}

describe('over S3', () => {
  let gateway: RadosgwLab
  let user: S3User
  let stranger: S3User
  beforeAll(async () => {
    gateway = await startRadosgw()
    user = await gateway.createUser('rclone')
    stranger = await gateway.createUser('stranger')
    secrets.push(user.secretKey, WRONG)
    await rclone(await configured(remoteOf(user)), ['mkdir', 'remote:bucket'])
  })
  afterAll(() => gateway?.[Symbol.asyncDispose]())

  const remoteOf = ({ accessKey, secretKey }: S3User, endpoint = gateway.endpoint) => ({
    type: 's3',
    provider: 'Ceph',
    endpoint,
    access_key_id: accessKey,
    secret_access_key: secretKey,
  })
  const somewhere = () => `bucket/storage-${randomBytes(4).toString('hex')}`
  /** With the uploads in parts that have not come to an end. */
  const withParts = (target: RemoteFolder, lookBy = target.configFile): RemoteFolder => ({
    ...target,
    async inspect(): Promise<RawObject[]> {
      const list = rclone(lookBy, ['backend', 'list-multipart-uploads', 'remote:bucket'])
      const [whole, printed] = await Promise.all([target.inspect(), list])
      const { bucket = [] }: { bucket?: { Key: string }[] } = JSON.parse(String(printed))
      const parts = bucket.filter(({ Key }) => `bucket/${Key}`.startsWith(`${target.path}/`))
      return [...whole, ...parts.map(({ Key }) => ({ name: `parts of ${Key}`, size: 0 }))]
    },
  })
  const refused = async (remote: Record<string, string>, pathPrefix = 'bucket') =>
    new RcloneDriver({
      remoteName: 'remote',
      configFile: await configured(remote),
      pathPrefix,
      timeoutMs: 10_000,
    })

  describeDriver('RcloneDriver over S3', {
    capabilities,
    create: async () => withParts(targetOn(await configured(remoteOf(user)), somewhere())),
    leaveUnfinished,
    fill,
    neighbour: async ({ configFile, path }) =>
      new RcloneDriver({ remoteName: 'remote', configFile, pathPrefix: `${path}2` }),
    async createFull() {
      const user = await gateway.createUser(`full-${randomBytes(4).toString('hex')}`)
      const quota = ['--quota-scope', 'bucket', '--uid', user.uid]
      await gateway.admin('quota', 'set', ...quota, '--max-size', String(CAPACITY))
      await gateway.admin('quota', 'enable', ...quota)
      const configFile = await configured(remoteOf(user))
      const bucket = `small-${randomBytes(4).toString('hex')}`
      await rclone(configFile, ['mkdir', `remote:${bucket}`])
      // the gateway counts a part when it is stored, so that several at once may pass together
      const env = { RCLONE_S3_UPLOAD_CONCURRENCY: '1' }
      return { ...targetOn(configFile, `${bucket}/storage`, { env }), capacity: CAPACITY }
    },
    largeSize: 12_000_011,
    turns: 2,
    remote: {
      async create() {
        const proxy = await NetworkProxy.start(gateway)
        const configFile = await configured(remoteOf(user, `http://127.0.0.1:${proxy.port}`))
        const lookBy = await configured(remoteOf(user))
        const target = withParts(
          targetOn(configFile, somewhere(), { lookBy, timeoutMs: IDLE_TIMEOUT_MS }),
          lookBy,
        )
        const dispose = () => proxy[Symbol.asyncDispose]()
        return { ...target, proxy, dispose }
      },
      restartServer: () => gateway.restart(),
      idleTimeoutMs: IDLE_TIMEOUT_MS,
      keepsConnections: false,
      cutSize: 6_000_003, // two parts
      mostCuts: 4,
      refused: [
        {
          what: 'a wrong secret key',
          code: 'STORAGE_ACCESS_DENIED',
          create: () => refused({ ...remoteOf(user), secret_access_key: WRONG }),
        },
        {
          what: 'a user without rights',
          code: 'STORAGE_ACCESS_DENIED',
          create: () => refused(remoteOf(stranger)),
        },
        {
          what: 'a missing bucket',
          code: 'STORAGE_NOT_FOUND',
          create: () => refused(remoteOf(user), 'no-such-bucket-here'),
        },
        {
          what: 'a certificate of an unknown authority',
          code: 'STORAGE_UNREACHABLE',
          create: () => refused(remoteOf(user, `https://127.0.0.1:${gateway.tlsPort}`)),
        },
      ],
      secrets,
    },
  })
})

describe('over crypt', () => {
  let disk: Tmpfs
  let password: string
  beforeAll(async () => {
    disk = await mountTmpfs(`size=${CAPACITY}`)
    password = String(await rclone('', ['obscure', '-'], 'crypt-secret-3')).trim()
  })
  afterAll(() => disk?.dispose())

  /** A driver on an encrypted folder. No file is in it that cannot be decrypted. */
  async function encrypted(above = folder): Promise<RemoteFolder> {
    const encryptedPath = join(above, randomBytes(4).toString('hex'))
    await mkdir(encryptedPath)
    const configFile = await configured({ type: 'crypt', remote: encryptedPath, password })
    await rclone(configFile, ['mkdir', 'remote:storage'])
    const [storage = ''] = await readdir(encryptedPath)
    const target = targetOn(configFile, 'storage')
    return {
      ...target,
      async inspect() {
        const [seen, files] = await Promise.all([target.inspect(), filesIn(join(encryptedPath, storage))])
        const hidden = files.slice(seen.length)
        return [...seen, ...hidden.map(({ name, size }) => ({ name: `encrypted ${name}`, size }))]
      },
      dispose: () => rm(encryptedPath, { recursive: true }),
    }
  }

  describeDriver('RcloneDriver over crypt', {
    capabilities,
    create: () => encrypted(),
    leaveUnfinished,
    fill,
    async neighbour({ configFile, path }) {
      await rclone(configFile, ['mkdir', `remote:${path}2`])
      return new RcloneDriver({ remoteName: 'remote', configFile, pathPrefix: `${path}2` })
    },
    createFull: async () => ({ ...(await encrypted(disk.path)), capacity: CAPACITY }),
    longestName: 143, // of 255 bytes when it is encrypted
    largeSize: 8_000_011,
    turns: 2,
  })
})
