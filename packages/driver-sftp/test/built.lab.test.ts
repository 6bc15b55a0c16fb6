import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { NetworkProxy, PatternBody, patternBytes } from '@varve/testkit'
import { startSshd } from '@varve/testkit/lab'
import { build } from 'tsup'
import { expect, onTestFinished, test } from 'vitest'
import { output } from '../../../tsup.config.ts'
import { login, sftpTarget } from './sftp-target.ts'

const root = fileURLToPath(new URL('../../../', import.meta.url))

test('the driver as it is built tries again on a new connection, and succeeds', async () => {
  const { SftpDriver } = await built()
  await using lab = await startSshd()
  await using proxy = await NetworkProxy.start({ port: lab.port })
  const target = await sftpTarget(lab)
  onTestFinished(() => target.dispose().catch(() => undefined)) // the server is gone by then
  const options = { ...(await login(lab)), port: proxy.port, pathPrefix: target.path, timeoutMs: 8000 }
  await using driver = new SftpDriver(options)

  const body = new PatternBody({ size: 14_000_000, seed: 1 })
  proxy.cutAfter(12_000_000, 'toServer')
  await driver.put('a/large', body)
  expect(proxy.cuts).toBe(1)
  expect(Buffer.from(await target.readRaw('a/large')).equals(patternBytes(1, 0, body.size))).toBe(true)

  proxy.cutAfter(1, 'toServer')
  expect(await driver.stat('a/large')).toMatchObject({ size: body.size })
  expect(proxy.cuts).toBe(2)
})

/** The package, built as for a release, of the source as it is now. */
async function built(): Promise<typeof import('@varve/driver-sftp')> {
  const cache = join(root, 'node_modules/.cache') // from where the dependencies are found
  await mkdir(cache, { recursive: true })
  const outDir = await mkdtemp(join(cache, 'built-'))
  onTestFinished(() => rm(outDir, { recursive: true }))
  await build({
    ...output,
    entry: [join(root, 'packages/driver-sftp/src/index.ts')],
    outDir,
    config: false,
    silent: true,
    external: [/^[^./]/],
    noExternal: ['@varve/core'],
    esbuildOptions(options) {
      options.alias = { '@varve/core': join(root, 'packages/core/src/index.ts') }
    },
  })
  return import(join(outDir, 'index.js'))
}
