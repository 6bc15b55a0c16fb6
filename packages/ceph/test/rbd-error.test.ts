import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { CephConnector } from '../src/index.ts'

const cluster = new CephConnector({ conf: '/dev/null' }).cluster()
let folder: string

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-rbd-error-'))
  vi.stubEnv('PATH', `${folder}:${process.env.PATH}`)
})
afterEach(async () => {
  vi.unstubAllEnvs()
  await rm(folder, { recursive: true })
})

/** Puts a program in the place of rbd that fails as no cluster can be made to. */
function rbd(script: string): Promise<void> {
  return writeFile(join(folder, 'rbd'), `#!/bin/sh\n${script}\n`, { mode: 0o755 })
}

test('a failure that no table knows says how rbd ended, what it said and what to do', async () => {
  await rbd('echo "rbd: failed to list snapshots: (22) Invalid argument" >&2; exit 22')
  await expect(cluster.snapshots('vms/a')).rejects.toMatchObject({
    code: 'RBD_FAILED',
    message:
      'rbd snap ls of vms/a failed (exit 22) and said: rbd: failed to list snapshots: (22) Invalid argument. See `ceph health detail`, then try again.',
    context: { exitCode: 22 },
  })
  await rbd('kill -s KILL $$')
  const killed = { code: 'RBD_FAILED', context: { exitCode: undefined, endedBy: 'SIGKILL' } }
  await expect(cluster.snapshots('vms/a')).rejects.toMatchObject({
    ...killed,
    message:
      'rbd snap ls of vms/a failed (ended by SIGKILL) and said: nothing. See `ceph health detail`, then try again.',
  })
  const { stream } = cluster.exportDiff('vms/a', { snapshot: 'one' })
  await expect(buffer(stream)).rejects.toMatchObject({
    ...killed,
    message: expect.stringMatching(/^rbd export-diff of vms\/a failed \(ended by SIGKILL\).*try again\.$/),
  })
})

test('an rbd that aborts when its requests time out is told as a cluster that does not answer', async () => {
  await rbd('echo "librbd: failed to read from object: (110) Connection timed out" >&2; kill -s ABRT $$')
  const { stream } = cluster.exportDiff('vms/a', { snapshot: 'one' })
  await expect(buffer(stream)).rejects.toMatchObject({
    code: 'CEPH_UNREACHABLE',
    retryable: true,
    context: { endedBy: 'SIGABRT' },
  })
})

test('an export of another snapshot than was asked for says what to do', async () => {
  const size = '\\000\\000\\020\\000\\000\\000\\000\\000'
  await rbd(`printf 'rbd diff v1\\nt\\003\\000\\000\\000twos${size}e'`)
  const { stream } = cluster.exportDiff('vms/a', { snapshot: 'one' })
  await expect(buffer(stream)).rejects.toMatchObject({
    code: 'RBD_STREAM_INVALID',
    message: expect.stringMatching(/to two, where those from nothing to one .*back up again\.$/),
  })
})
