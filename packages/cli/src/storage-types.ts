import { isAbsolute } from 'node:path'
import { z } from 'zod'
import { type Secret, secretField } from './secret.ts'
import { type SecretReader, type StorageType, storageType } from './storage-type.ts'

const local = storageType(
  z.strictObject({
    path: z.string().refine(isAbsolute, 'must be an absolute path, such as /mnt/backup'),
    create: z.boolean().exactOptional(),
    requireMountPoint: z.boolean().exactOptional(),
    marker: z.string().exactOptional(),
  }),
  async options => new (await import('@varve/driver-local')).LocalDriver(options),
)

const ftp = storageType(
  z.strictObject({
    host: z.string().min(1),
    port: z.int().min(1).max(65_535).exactOptional(),
    username: z.string().min(1),
    password: secretField,
    pathPrefix: z.string().exactOptional(),
    create: z.boolean().exactOptional(),
    tls: z.enum(['explicit', 'implicit', 'none']).exactOptional(),
    ca: secretField.exactOptional(), // no secret, but a certificate is easier kept in a file
    tlsServerName: z.string().exactOptional(),
    connections: z.int().min(1).max(100).exactOptional(),
    timeoutMs: z.int().min(1).exactOptional(),
  }),
  async ({ password, ca, ...options }, secrets) => {
    const { FtpDriver } = await import('@varve/driver-ftp')
    return new FtpDriver({
      ...options,
      password: await secrets('password', password),
      ...(ca === undefined ? {} : { ca: await secrets('ca', ca) }),
    })
  },
)

const sftp = storageType(
  z.strictObject({
    host: z.string().min(1, 'must not be empty'),
    port: z.int().min(1).max(65_535).exactOptional(),
    username: z.string().min(1, 'must not be empty'),
    password: secretField.exactOptional(),
    pathPrefix: z.string().exactOptional(),
    privateKey: secretField.exactOptional(),
    passphrase: secretField.exactOptional(),
    agent: z.string().refine(isAbsolute, "must be the path of an agent's socket").exactOptional(),
    hostKey: z.union([z.string(), z.array(z.string())]).exactOptional(),
    knownHosts: z.string().refine(isAbsolute, 'must be the path of a known_hosts file').exactOptional(),
    create: z.boolean().exactOptional(),
    timeoutMs: z.int().exactOptional(),
    retries: z.int().exactOptional(),
  }),
  async ({ password, privateKey, passphrase, ...options }, secrets) => {
    const { SftpDriver } = await import('@varve/driver-sftp')
    return new SftpDriver({
      ...options,
      ...(password !== undefined && { password: await secrets('password', password) }),
      ...(privateKey !== undefined && { privateKey: await secrets('privateKey', privateKey) }),
      ...(passphrase !== undefined && { passphrase: await secrets('passphrase', passphrase) }),
    })
  },
)

const s3 = storageType(
  z.strictObject({
    endpoint: z.url({ protocol: /^https?$/ }).exactOptional(),
    bucket: z.string().min(1, 'must not be empty'),
    region: z.string().exactOptional(),
    accessKey: z.string().min(1, 'must not be empty').exactOptional(),
    secretKey: secretField.exactOptional(),
    sessionToken: secretField.exactOptional(),
    pathPrefix: z.string().exactOptional(),
    pathStyle: z.boolean().exactOptional(),
    storageClass: z.string().exactOptional(),
    serverSideEncryption: z.enum(['AES256', 'aws:kms', 'aws:kms:dsse']).exactOptional(),
    kmsKeyId: z.string().exactOptional(),
    ca: z.string().exactOptional(),
    checksums: z.enum(['WHEN_SUPPORTED', 'WHEN_REQUIRED']).exactOptional(),
    partSize: z.int().exactOptional(),
    maxParts: z.int().exactOptional(),
    equalParts: z.boolean().exactOptional(),
    parallelParts: z.int().exactOptional(),
    timeoutMs: z.int().exactOptional(),
    retries: z.int().exactOptional(),
  }),
  async ({ secretKey, sessionToken, ...options }, secrets) => {
    const { S3Driver } = await import('@varve/driver-s3')
    return new S3Driver({
      ...options,
      ...(secretKey !== undefined && { secretKey: await secrets('secretKey', secretKey) }),
      ...(sessionToken !== undefined && { sessionToken: await secrets('sessionToken', sessionToken) }),
    })
  },
)

const rclone = storageType(
  z.strictObject({
    remoteName: z.string().min(1, 'must not be empty'),
    pathPrefix: z.string().exactOptional(),
    create: z.boolean().exactOptional(),
    configFile: z.string().refine(isAbsolute, 'must be an absolute path').exactOptional(),
    remotes: z.record(z.string(), z.record(z.string(), secretField)).exactOptional(), // which options are secrets, rclone knows
    env: z.record(z.string(), secretField).exactOptional(),
    command: z.string().min(1, 'must not be empty').exactOptional(),
    timeoutMs: z.int().min(1).exactOptional(),
  }),
  async ({ remotes = {}, env = {}, ...options }, secrets) => {
    const { RcloneDriver } = await import('@varve/driver-rclone')
    const given: Record<string, Record<string, string>> = {}
    for (const [name, remote] of Object.entries(remotes)) {
      given[name] = await readAll(`remotes.${name}`, remote, secrets)
    }
    return new RcloneDriver({ ...options, remotes: given, env: await readAll('env', env, secrets) })
  },
)

async function readAll(
  field: string,
  values: Readonly<Record<string, Secret>>,
  secrets: SecretReader,
): Promise<Record<string, string>> {
  const read: Record<string, string> = {}
  for (const [name, value] of Object.entries(values)) read[name] = await secrets(`${field}.${name}`, value)
  return read
}

/** The kinds of storage that the configuration may name, by their `type`. */
export const STORAGE_TYPES: ReadonlyMap<string, StorageType> = new Map([
  ['local', local],
  ['ftp', ftp],
  ['sftp', sftp],
  ['s3', s3],
  ['rclone', rclone],
])
