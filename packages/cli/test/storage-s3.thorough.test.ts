import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  compareImages,
  createQcow2,
  freePorts,
  qemuIo,
  type RadosgwLab,
  type S3User,
  startRadosgw,
} from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { inBucket, makeBucket, rawClient } from '../../driver-s3/test/s3-target.ts'
import { cli } from './test-terminal.ts'

const MIB = 1024 ** 2
const WRONG = 'not the secret'

let folder: string
let gateway: RadosgwLab
let user: S3User
let bucket: string
let closedPort: number

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-cli-s3-'))
  gateway = await startRadosgw()
  user = await gateway.createUser('panel')
  bucket = await makeBucket(rawClient(gateway, user))
  ;[closedPort = 0] = await freePorts(1)
})
afterAll(async () => {
  await gateway?.[Symbol.asyncDispose]()
  await rm(folder, { recursive: true })
})

const s3 = () => ({
  type: 's3',
  endpoint: gateway.endpoint,
  region: 'us-east-1',
  bucket,
  accessKey: user.accessKey,
  secretKey: { env: 'S3_SECRET' },
  pathPrefix: 'panel',
  retries: 1,
})
const rclone = () => ({
  type: 'rclone',
  remoteName: 'cloud',
  pathPrefix: `${bucket}/panel`,
  remotes: {
    cloud: {
      type: 's3',
      provider: 'Ceph',
      endpoint: gateway.endpoint,
      access_key_id: user.accessKey,
      secret_access_key: { env: 'S3_SECRET' },
    },
  },
})

/** Runs a command on a configuration that has one storage, and gives the document that it printed. */
async function run(storage: object, args: readonly string[]) {
  const cwd = await mkdtemp(join(folder, 'cwd-'))
  const config = { storages: { cloud: storage }, stateDir: join(folder, 'state') }
  await writeFile(join(cwd, 'varve.config.json'), JSON.stringify(config))
  const env = { S3_SECRET: user.secretKey, WRONG_SECRET: WRONG }
  const end = await cli([...args, '--json'], { cwd, env })
  for (const secret of Object.values(env)) expect(JSON.stringify(end)).not.toContain(secret)
  return { ...end, document: JSON.parse(end.stdout) }
}

test.each<[string, () => object, string, string, RegExp]>([
  [
    'a port that nobody listens on',
    () => ({ ...s3(), endpoint: `http://127.0.0.1:${closedPort}` }),
    'connect',
    'STORAGE_UNREACHABLE',
    /refused/,
  ],
  [
    'a wrong secret',
    () => ({ ...s3(), secretKey: { env: 'WRONG_SECRET' } }),
    'connect',
    'STORAGE_ACCESS_DENIED',
    /secret/i,
  ],
  ['a missing bucket', () => ({ ...s3(), bucket: 'none' }), 'connect', 'STORAGE_NOT_FOUND', /none/],
  [
    'a remote that rclone does not know',
    () => ({ ...rclone(), remoteName: 'nowhere' }),
    'connect',
    'INVALID_CONFIG',
    /nowhere.*listremotes/,
  ],
])('%s is told from all else', async (_, storage, failing, failure, message) => {
  const { code, document } = await run(storage(), ['storage', 'check'])
  expect(code).toBe(1)
  expect(document.checks.at(-1)).toEqual({
    name: failing,
    ok: false,
    code: failure,
    message: expect.stringMatching(message),
  })
})

test('a backup that goes to S3 by the configuration is found, verified and restored, also through rclone', async () => {
  for (const storage of [s3(), rclone()])
    expect(await run(storage, ['storage', 'check'])).toMatchObject({ code: 0, document: { ok: true } })
  const disk = join(folder, 'disk.qcow2')
  await createQcow2(disk, 16 * MIB)
  await qemuIo(disk, 'qcow2', ['write -P 0x11 0 7M', 'write -P 0x22 9M 64k'])
  const { document: manifest } = await run(s3(), ['backup', 'web-1', '--disk', `vda=${disk}`])
  const stored = await inBucket(rawClient(gateway, user), bucket, `panel/web-1/${manifest.chain}/`)
  expect(stored.map(({ name }) => name)).toContain(`${manifest.id}/vda.qcow2`)

  expect((await run(rclone(), ['list'])).document.backups).toMatchObject([{ id: manifest.id }])
  expect((await run(rclone(), ['verify', manifest.id, '--deep'])).document).toMatchObject({ ok: true })
  const path = join(folder, 'restored.qcow2')
  expect(await run(s3(), ['restore', manifest.id, '--to-disk', `vda=${path}`])).toMatchObject({ code: 0 })
  const images = [disk, path].map(image => ({ path: image, format: 'qcow2' as const }))
  expect(await compareImages(images[0] ?? expect.fail(), images[1] ?? expect.fail())).toMatchObject({
    identical: true,
  })
})
