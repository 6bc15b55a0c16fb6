import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { StorageDriver } from '@varve/core'
import { FtpDriver } from '@varve/driver-ftp'
import { RcloneDriver } from '@varve/driver-rclone'
import { S3Driver } from '@varve/driver-s3'
import { SftpDriver } from '@varve/driver-sftp'
import { startRadosgw, startSshd, startVsftpd } from '@varve/testkit/lab'
import { execa } from 'execa'

/** A storage on a real server, and how an example reaches it. */
export interface RemoteSite extends AsyncDisposable {
  readonly driver: StorageDriver
  /** What an example is given between the instance and the folder of its state. */
  readonly args: readonly string[]
  readonly env?: Readonly<Record<string, string>>
  /** Below which `driver` and the example store, or a copy of it that no part of Varve has made. */
  files(): Promise<string>
}

/** Runs rclone in an environment of its own, and gives what it prints. */
async function runRclone(args: readonly string[], env: Record<string, string>): Promise<string> {
  const { stdout } = await execa('rclone', args, {
    env: { PATH: process.env.PATH ?? '', ...env },
    extendEnv: false,
  })
  return stdout
}

/** Copies what rclone finds in the remote `site:`. */
async function copied(from: string, folder: string, env: Record<string, string>): Promise<string> {
  const target = join(folder, 'copied')
  await runRclone(['copy', `site:${from}`, target], env)
  return target
}

async function s3(folder: string): Promise<RemoteSite> {
  const server = await startRadosgw()
  const { endpoint } = server
  const { accessKey, secretKey } = await server.createUser('site')
  const env = {
    RCLONE_CONFIG: '/dev/null',
    RCLONE_CONFIG_SITE_TYPE: 's3',
    RCLONE_CONFIG_SITE_PROVIDER: 'Ceph',
    RCLONE_CONFIG_SITE_ENDPOINT: endpoint,
    RCLONE_CONFIG_SITE_ACCESS_KEY_ID: accessKey,
    RCLONE_CONFIG_SITE_SECRET_ACCESS_KEY: secretKey,
  }
  await runRclone(['mkdir', 'site:backups'], env)
  return {
    driver: new S3Driver({ endpoint, bucket: 'backups', accessKey, secretKey, pathPrefix: 'varve' }),
    args: [endpoint, 'backups'],
    env: { S3_ACCESS_KEY: accessKey, S3_SECRET_KEY: secretKey },
    files: () => copied('backups/varve', folder, env),
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  }
}

async function sftp(folder: string): Promise<RemoteSite> {
  const server = await startSshd()
  const { port, username, password, keyFile, home } = server
  const knownHosts = join(folder, 'known_hosts')
  await writeFile(knownHosts, `[127.0.0.1]:${port} ${await server.hostKey()}\n`)
  const place = { pathPrefix: 'backups', create: true }
  return {
    driver: new SftpDriver({ host: '127.0.0.1', port, username, password, knownHosts, ...place }),
    args: [`sftp://${username}@127.0.0.1:${port}`, keyFile, knownHosts],
    files: async () => join(home, 'backups'),
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  }
}

async function ftp(folder: string): Promise<RemoteSite> {
  const server = await startVsftpd({ tls: 'explicit' })
  const { port, username, password, home } = server
  const ca = await server.certificate()
  const caFile = join(folder, 'ftp.pem')
  await writeFile(caFile, ca)
  const place = { pathPrefix: 'backups', create: true }
  return {
    driver: new FtpDriver({ host: '127.0.0.1', port, username, password, ca, ...place }),
    args: [`ftp://${username}@127.0.0.1:${port}`, caFile],
    env: { FTP_PASSWORD: password },
    files: async () => join(home, 'backups'),
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  }
}

/** A remote of a configuration that `rclone config` has made in a home of its own. */
async function rclone(folder: string): Promise<RemoteSite> {
  const path = join(folder, 'remote')
  await mkdir(join(path, 'backups'), { recursive: true })
  const env = { HOME: folder }
  await runRclone(['config', 'create', 'site', 'alias', `remote=${path}`], env)
  const configFile = (await runRclone(['config', 'file'], env)).trim().split('\n').at(-1) ?? ''
  return {
    driver: new RcloneDriver({ remoteName: 'site', configFile, pathPrefix: 'backups' }),
    args: ['site', 'backups'],
    env,
    files: async () => join(path, 'backups'),
    [Symbol.asyncDispose]: async () => undefined,
  }
}

/** What a storage is called in the examples. */
export type SiteType = 's3' | 'sftp' | 'ftp' | 'rclone'

/** By the type of the storage. Each takes a folder of its own for what it needs; whoever gave it removes it. */
export const SITES: Readonly<Record<SiteType, (folder: string) => Promise<RemoteSite>>> = {
  s3,
  sftp,
  ftp,
  rclone,
}
