import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import type { StorageDriver } from '@varve/core'
import { FtpDriver } from '@varve/driver-ftp'
import { LocalDriver } from '@varve/driver-local'
import { RcloneDriver } from '@varve/driver-rclone'
import { S3Driver } from '@varve/driver-s3'
import { SftpDriver } from '@varve/driver-sftp'
import { startRadosgw, startSshd, startVsftpd } from '@varve/testkit/lab'
import { execa } from 'execa'

/** Where the demonstration keeps its backups. */
export interface Store extends AsyncDisposable {
  /** What it is, for the screen. */
  readonly title: string
  readonly driver: StorageDriver
  /** A folder with what is stored, as the server itself holds or gives it: no part of Varve reads it. */
  files(): Promise<string>
}

/** Opens a store that keeps what it needs below `folder`. */
type OpenStore = (folder: string) => Promise<Store>

async function localStore(folder: string): Promise<Store> {
  const path = join(folder, 'storage')
  await mkdir(path)
  return storeOf('a local folder', new LocalDriver({ path }), async () => path)
}

async function sftpStore(): Promise<Store> {
  const server = await startSshd()
  const { port, username, password } = server
  const driver = new SftpDriver({
    host: '127.0.0.1',
    port,
    username,
    password,
    hostKey: await server.fingerprint(),
    pathPrefix: 'backups',
    create: true,
  })
  return storeOf(`OpenSSH's sftp server`, driver, async () => join(server.home, 'backups'), server)
}

async function ftpStore(): Promise<Store> {
  const server = await startVsftpd()
  const { port, username, password } = server
  const place = { pathPrefix: 'backups', create: true }
  const driver = new FtpDriver({ host: '127.0.0.1', port, username, password, tls: 'none', ...place })
  return storeOf('vsftpd', driver, async () => join(server.home, 'backups'), server)
}

async function s3Store(folder: string): Promise<Store> {
  const server = await startRadosgw()
  const { endpoint } = server
  const { accessKey, secretKey } = await server.createUser('demo')
  const env = rcloneRemote({
    type: 's3',
    provider: 'Ceph',
    endpoint,
    access_key_id: accessKey,
    secret_access_key: secretKey,
  })
  await execa('rclone', ['mkdir', 'demo:varve'], { env, extendEnv: false })
  const driver = new S3Driver({ endpoint, bucket: 'varve', accessKey, secretKey, pathPrefix: 'backups' })
  const files = () => copied('demo:varve/backups', join(folder, 'copied'), env)
  return storeOf(`Ceph's S3 gateway`, driver, files, server)
}

async function rcloneStore(folder: string): Promise<Store> {
  const path = join(folder, 'encrypted')
  await mkdir(path)
  const remotes = { demo: { type: 'crypt', remote: path, password: 'only for this demonstration' } }
  const driver = new RcloneDriver({ remoteName: 'demo', remotes })
  const { stdout: password } = await execa('rclone', ['obscure', remotes.demo.password])
  const env = rcloneRemote({ ...remotes.demo, password })
  const files = () => copied('demo:', join(folder, 'copied'), env)
  return storeOf(`rclone's crypt over a local folder`, driver, files)
}

function storeOf(
  title: string,
  driver: StorageDriver,
  files: () => Promise<string>,
  server?: AsyncDisposable,
): Store {
  const dispose = async () => {
    await driver[Symbol.asyncDispose]()
    await server?.[Symbol.asyncDispose]()
  }
  return { title, driver, files, [Symbol.asyncDispose]: dispose }
}

/** The environment in which rclone knows the remote `demo:`. */
function rcloneRemote(options: Readonly<Record<string, string>>): Record<string, string> {
  const variables = Object.entries(options).map(([name, value]) => [
    `RCLONE_CONFIG_DEMO_${name.toUpperCase()}`,
    value,
  ])
  return {
    PATH: process.env.PATH ?? '',
    RCLONE_CONFIG: '/dev/null',
    ...Object.fromEntries(variables),
  }
}

/** What rclone itself finds on the storage. */
async function copied(remote: string, target: string, env: Record<string, string>): Promise<string> {
  await execa('rclone', ['copy', remote, target], { env, extendEnv: false })
  return target
}

/** The stores that `--storage` chooses from. */
export const STORES: ReadonlyMap<string, OpenStore> = new Map([
  ['local', localStore],
  ['s3', s3Store],
  ['sftp', sftpStore],
  ['ftp', ftpStore],
  ['rclone', rcloneStore],
])
