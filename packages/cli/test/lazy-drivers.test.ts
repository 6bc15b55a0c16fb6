import { execa } from 'execa'
import { expect, test } from 'vitest'

const packages = new URL('../../', import.meta.url).href

const STORAGES = {
  folder: { type: 'local', path: '/mnt/backup' },
  ftp: { type: 'ftp', host: 'nas', username: 'varve', password: 'x' },
  sftp: { type: 'sftp', host: 'nas', username: 'varve', password: 'x', hostKey: `SHA256:${'x'.repeat(43)}` },
  s3: { type: 's3', bucket: 'backups', region: 'eu', accessKey: 'x', secretKey: 'x' },
  rclone: { type: 'rclone', remoteName: 'nas' },
}

/** Opens storages of the configuration in a process of its own, which prints every module that it loads. */
const PROGRAM = `
import { registerHooks } from 'node:module'
const [packages, storages, ...names] = process.argv.slice(1)
const loaded = []
registerHooks({
  resolve(specifier, context, next) {
    const [, part] = /^@varve\\/([a-z0-9-]+)$/.exec(specifier) ?? []
    const found = part ? { url: packages + part + '/src/index.ts', shortCircuit: true } : next(specifier, context)
    loaded.push(found.url)
    return found
  },
})
const { openStorage, parseConfig } = await import(packages + 'cli/src/config.ts')
const config = parseConfig(JSON.stringify({ storages: JSON.parse(storages) }), '/etc/varve/config.json')
for (const name of names) await openStorage(config, name, {})
console.log(JSON.stringify(loaded))
`

async function modulesLoadedFor(...names: (keyof typeof STORAGES)[]): Promise<string[]> {
  const args = ['--input-type=module', '--eval', PROGRAM, packages, JSON.stringify(STORAGES), ...names]
  const { stdout } = await execa(process.execPath, args, { timeout: 50_000 })
  return JSON.parse(stdout)
}

/** What only some drivers need. */
const HEAVY = [
  '@aws-sdk',
  '@smithy',
  'ssh2',
  'basic-ftp',
  'driver-s3',
  'driver-sftp',
  'driver-ftp',
  'driver-rclone',
]
const heavyOf = (modules: string[]) => HEAVY.filter(name => modules.some(url => url.includes(`/${name}/`)))

test('a local storage loads no other driver, whatever the configuration names', async () => {
  const modules = await modulesLoadedFor('folder')
  expect(modules).toContain(`${packages}driver-local/src/index.ts`)
  expect(heavyOf(modules)).toEqual([])
})

test('the others are loaded when they are opened', async () => {
  expect(heavyOf(await modulesLoadedFor('ftp', 'sftp', 's3', 'rclone'))).toEqual(HEAVY)
})
